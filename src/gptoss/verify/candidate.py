"""A backend whose every layer can be run alone, on any input: nothing is asked but the protocol.

A layer alone is a model of one layer whose embedding table is the input, a token for each row of
it. The head alone is a model whose one layer adds nothing, some rows of the vocabulary at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.backends import load_backend
from gptoss.backends.protocol import Backend, Batch
from gptoss.model.config import ModelConfig
from gptoss.model.reference import NDArray
from gptoss.model.weights import Read, Stored, specs
from gptoss.verify.layers import Points, dense, slices
from gptoss.verify.precision import Precision, precision_of


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend and its options, of one checkpoint."""

    config: ModelConfig
    read: Read
    backend: str
    options: dict[str, Any] = field(default_factory=dict)  # of ``load_backend``

    @property
    def precision(self) -> Precision:
        """What it rounds."""
        told = (self.options.get(name) for name in ("dtype", "precision", "kv"))
        return precision_of(self.config, self.backend, *told)

    def open(self, config: ModelConfig | None = None, read: Read | None = None) -> Backend:
        """The backend, with the whole model or another."""
        config, read = config or self.config, read or self.read
        return load_backend(self.backend, config, read, **self.options)

    def layer(self, layer: int, x: NDArray, starts: NDArray) -> Points:
        """Every trace point of one layer alone, on the input x: [T, D]."""
        window = self.config.window(layer) or self.config.context_length
        alone = replace(self.config, num_hidden_layers=1, vocab_size=len(x), sliding_window=window)

        def read(name: str) -> Stored:
            if name.startswith("block.0."):
                return self.read(f"block.{layer}.{name.removeprefix('block.0.')}")
            return outside(name, x, np.zeros(x.shape, np.float32))

        seen = traced(self.open(alone, read), np.split(np.arange(len(x)), starts[1:-1]), [])
        return {
            name.replace("block.0", f"block.{layer}", 1): value
            for name, value in seen.items()
            if name.startswith("block.")
        }

    def head(self, x: NDArray) -> Iterator[tuple[slice, Points]]:
        """The last norm and the logits alone, on x: [T, D], for some rows of the vocabulary."""
        unembedding, scale = dense(self.read, "unembedding.weight"), self.read("norm.scale")
        for rows in slices(self.config):
            some = unembedding[rows]
            count = max(len(some), len(x))  # tokens must be in the vocabulary
            alone = replace(
                self.config,
                num_hidden_layers=1,
                vocab_size=count,
                num_attention_heads=1,
                num_key_value_heads=1,
                num_experts=1,
                experts_per_token=1,
                intermediate_size=32,
            )
            padded = np.concatenate(
                [some, np.zeros((count - len(some), some.shape[1]), some.dtype)]
            )
            shapes = {spec.name: spec.shape for spec in specs(alone)}

            def read(name: str, padded: Any = padded, shapes: Any = shapes) -> Stored:
                if name.startswith("block.0."):
                    return np.zeros(shapes[name], np.float32)
                return scale if name == "norm.scale" else outside(name, x, padded)

            seen = traced(self.open(alone, read), [np.arange(len(x))], range(len(x)))
            yield rows, {"norm": seen["norm"], "logits": seen["logits"][:, : len(some)]}


def outside(name: str, x: NDArray, unembedding: NDArray) -> npt.NDArray[Any]:
    """What is no layer's, of a model that begins with x."""
    match name:
        case "embedding.weight":
            return np.asarray(x, np.float32)
        case "norm.scale":
            return np.ones(x.shape[1], np.float32)
    return np.asarray(unembedding)


def traced(backend: Backend, rows: list[Any], wanted: Any) -> Points:
    """Every trace point of rows that begin here."""
    seen: Points = {}
    forward(backend, rows, wanted, lambda name, x: seen.__setitem__(name, host(x)))
    return seen


def forward(
    backend: Backend, rows: list[Any], wanted: Any, trace: Callable[[str, Any], None] | None = None
) -> NDArray:
    """One step over whole rows, in a cache of their size."""
    cache = backend.new_cache(max_tokens=sum(map(len, rows)))
    slots = [cache.open() for _ in rows]
    for slot, row in zip(slots, rows, strict=True):
        cache.reserve(slot, len(row))
    batch = Batch.of(rows, [0] * len(rows), slots, wanted)
    return backend.to_numpy(backend.forward(batch, cache, trace))


def stepwise(backend: Backend, rows: list[Any], last: int) -> tuple[NDArray, Points]:
    """Logits of each row's last tokens, which come one by one behind the others: [R * last, V].

    And which experts every token of the rows has chosen, by the name of the trace point: [T, k].
    """
    cache = backend.new_cache(max_tokens=sum(map(len, rows)))
    slots = [cache.open() for _ in rows]
    stops = np.cumsum([len(row) for row in rows])
    found, routes = [], dict[str, NDArray]()
    for i in range(last):
        past = [len(row) - last + i if i else 0 for row in rows]
        new = [row[p : len(row) - last + i + 1] for row, p in zip(rows, past, strict=True)]
        places = [
            s - last + i + 1 - np.arange(len(n), 0, -1) for s, n in zip(stops, new, strict=True)
        ]
        here = np.concatenate(places)

        def keep(name: str, x: Any, here: NDArray = here) -> None:
            if name.endswith(".mlp.chosen"):
                chosen = host(x)
                kept = routes.setdefault(name, np.empty((stops[-1], chosen.shape[1]), int))
                kept[here] = chosen

        batch = Batch.of(new, past, slots)
        found.append(backend.to_numpy(backend.forward(batch, cache, keep)))
    return np.stack(found, axis=1).reshape(len(rows) * last, -1), routes


def host(x: Any) -> NDArray:
    """A backend's array on the host, integers as they are, the rest in float32 or wider."""
    if hasattr(x, "cpu"):  # a torch tensor; NumPy has no bfloat16
        x = x.detach().cpu()
        x = (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    return np.asarray(x)
