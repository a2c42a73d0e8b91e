"""``Backend`` and ``Cache`` over plain NumPy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Batch, Cache, Sampling
from gptoss.backends.sampling import sample_rows
from gptoss.backends.slots import Arrays, Slots
from gptoss.model import model
from gptoss.model.config import ModelConfig
from gptoss.model.reference import NDArray, NumpyOps, attend_row, unpack
from gptoss.model.weights import Read, build, specs

SMALL = 256 << 20  # bytes of widened experts that are kept


class ReferenceBackend:
    """Runs ``model.forward`` with ``NumpyOps``.

    Dense weights are widened once, at load. So are the experts of a small model; those of a large
    one stay as stored and are widened per use, so that a 20b fits beside its own page cache.
    """

    def __init__(self, config: ModelConfig, read: Read, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"the reference computes in float32 or float64, not {dtype}")
        self.config, self.dtype = config, dtype
        self.ops = NumpyOps()
        experts = sum(math.prod(spec.shape) for spec in specs(config) if spec.kind == "expert")
        small = experts * np.dtype(dtype).itemsize <= SMALL

        def widen(name: str) -> Any:
            stored = read(name)
            if name.endswith(("mlp1_weight", "mlp2_weight")) and not small:
                return stored
            return unpack(stored, dtype)

        self.weights = build(config, widen)

    def new_cache(self, *, max_tokens: int) -> "ListCache":
        """See ``Backend.new_cache``."""
        return ListCache(self.config, max_tokens, self.dtype)

    def forward(self, batch: Batch, cache: Cache, trace: model.Trace | None = None) -> NDArray:
        """See ``Backend.forward``."""
        assert isinstance(cache, ListCache)
        batch.check(self.config)
        return model.forward(
            self.weights,
            batch.tokens,
            batch.positions,
            batch.wanted,
            kv=ListView(cache, batch),
            ops=self.ops,
            config=self.config,
            trace=trace or model.no_trace,
        )

    def sample(
        self, logits: NDArray, rules: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int]:
        """See ``Backend.sample``."""
        return sample_rows(logits, rules, uniforms)

    def to_numpy(self, logits: NDArray) -> npt.NDArray[np.float32]:
        """See ``Backend.to_numpy``."""
        return np.asarray(logits, np.float32)


class ListCache(Slots):
    """Per slot and layer, the keys and values so far, as growing arrays. Nothing is forgotten."""

    def __init__(self, config: ModelConfig, max_tokens: int, dtype: str = "float32") -> None:
        super().__init__(max_tokens)
        self.layers, self.dtype = range(config.num_hidden_layers), np.dtype(dtype)
        self.row = config.num_key_value_heads, config.head_dim
        self.past: dict[tuple[int, int], tuple[NDArray, NDArray]] = {}

    def truncate(self, slot: int, length: int) -> None:
        """See ``Cache.truncate``."""
        super().truncate(slot, length)
        for layer in self.layers:
            if (slot, layer) in self.past:
                k, v = self.past[slot, layer]
                self.past[slot, layer] = k[:length], v[:length]

    def fork(self, slot: int, length: int) -> int:
        """See ``Cache.fork``."""
        child = self.open()
        try:
            self.reserve(child, length)
        except BaseException:
            super().close(child)
            raise
        for layer in self.layers:
            if (slot, layer) in self.past:
                k, v = self.past[slot, layer]
                self.past[child, layer] = k[:length], v[:length]
        return child

    def close(self, slot: int) -> None:
        """See ``Cache.close``."""
        super().close(slot)
        for layer in self.layers:
            self.past.pop((slot, layer), None)

    def dump(self, slot: int) -> Arrays:
        """See ``RowCache.dump``."""
        kept = {layer: self.past[slot, layer] for layer in self.layers}
        return {f"{layer}.{i}": x for layer, both in kept.items() for i, x in enumerate(both)}

    def fill(self, slot: int, length: int, arrays: Arrays) -> None:
        """See ``RowCache.fill``."""
        names = {f"{layer}.{i}" for layer in self.layers for i in (0, 1)}
        shape = (length, *self.row)
        if names != set(arrays) or any(
            x.shape != shape or x.dtype != self.dtype for x in arrays.values()
        ):
            raise ValueError("they are not as they are kept")
        for layer in self.layers:
            self.past[slot, layer] = arrays[f"{layer}.0"].copy(), arrays[f"{layer}.1"].copy()


class ListView:
    """``KV`` for one step."""

    def __init__(self, cache: ListCache, batch: Batch) -> None:
        self.past, self.batch = cache.past, batch

    def attend(
        self, layer: int, q: NDArray, k: NDArray, v: NDArray, sinks: NDArray, window: int | None
    ) -> NDArray:
        """See ``KV.attend``."""
        out = np.empty_like(q)
        for r, slot in enumerate(self.batch.slots.tolist()):
            new = slice(self.batch.starts[r], self.batch.starts[r + 1])
            keys, values = k[new], v[new]
            if (slot, layer) in self.past:
                old_k, old_v = self.past[slot, layer]
                keys, values = np.concatenate([old_k, keys]), np.concatenate([old_v, values])
            self.past[slot, layer] = keys, values
            out[new] = attend_row(q[new], keys, values, sinks, window)
        return out
