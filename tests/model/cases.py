"""Small models with vivid weights, our traces of them, and where two traces first diverge.

Vivid: sinks that take probability, biases that matter, activations past the clamp, rows so small
that the norm's epsilon counts, and scores broad enough that a key more or less is seen. Weights of
one size hide bugs; ``test_golden.py`` asserts that these do not.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Batch
from gptoss.backends.reference import ReferenceBackend
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK, Packed
from gptoss.model.weights import Stored, specs

TOLERANCE = 1e-4  # float32 against float32, relative to the largest value of a trace point

GOLDEN = Path(__file__).parents[1] / "golden"

Trace = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A config, a seed, and the lengths of the rows that run as one batch."""

    config: ModelConfig
    rows: tuple[int, ...]
    seed: int
    packed: bool = False  # experts as MXFP4
    ties: bool = False  # router rows, and their experts, come in equal pairs

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids, row by row."""
        rng = np.random.default_rng([self.seed, 1])
        return [rng.integers(0, self.config.vocab_size, n).tolist() for n in self.rows]

    @property
    def weights(self) -> dict[str, Stored]:
        """Canonical tensors, by name."""
        return vivid_weights(self.config, self.seed, packed=self.packed, ties=self.ties)


SMALL = ModelConfig(
    num_hidden_layers=3,
    hidden_size=32,
    vocab_size=50,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=6,
    experts_per_token=2,
    intermediate_size=32,
    sliding_window=5,
)
ODD = replace(
    SMALL,
    hidden_size=20,
    vocab_size=37,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=10,
    num_experts=5,
    experts_per_token=3,
    intermediate_size=28,
    sliding_window=7,
    swiglu_limit=2.0,  # at 7, clamping the gate from below would be lost in float32's rounding
)
STORED = {  # their transformers traces lie in tests/golden
    "packed": Case(config=SMALL, rows=(9, 21), seed=1, packed=True),
    "odd": Case(config=ODD, rows=(17,), seed=2),
}


def vivid_weights(
    config: ModelConfig, seed: int, *, packed: bool = False, ties: bool = False
) -> dict[str, Stored]:
    """Random tensors, each of a size at which it leaves a mark on the answer.

    Rounded to float16, so that they can be stored in half the room.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, Stored] = {}
    for spec in specs(config):
        tail = spec.name.split(".", 2)[-1] if spec.name.startswith("block") else spec.name
        std, mean = _size(tail, spec.shape[-1])
        if packed and spec.kind == "expert":
            tensors[spec.name] = random_packed(rng, spec.shape, std)
            continue
        x = rng.standard_normal(spec.shape, np.float32) * np.float32(std) + np.float32(mean)
        if tail == "embedding.weight":  # a third of the tokens are so small that epsilon counts
            x[::3] *= np.float32(0.003)
        if ties and tail.startswith("mlp.") and tail != "mlp.norm.scale":
            x[1::2] = x[: len(x) // 2 * 2 : 2]
        tensors[spec.name] = x.astype(np.float16).astype(np.float32)
    return tensors


def _size(tail: str, columns: int) -> tuple[float, float]:
    """Standard deviation and mean of one kind of tensor."""
    match tail:
        case "attn.norm.scale" | "mlp.norm.scale" | "norm.scale":
            return 0.1, 1.0
        case "attn.sinks":
            return 2.0, 2.0  # as large as the logsumexp of the scores
        case "attn.qkv.weight" | "attn.out.weight" | "mlp.gate.weight":
            return columns**-0.5, 0.0
        case "mlp.mlp1_weight":
            return 4.0 * columns**-0.5, 0.0  # one activation in twelve is past 7
        case "mlp.mlp2_weight":
            return 0.2 * columns**-0.5, 0.0
        case "embedding.weight" | "unembedding.weight" | "mlp.mlp1_bias":
            return 1.0, 0.0
        case _:
            return 0.5, 0.0  # the other biases


def random_packed(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Packed:
    """Random nibbles under scales of three sizes, with about the asked standard deviation."""
    groups = (*shape[:-1], shape[-1] // BLOCK)
    middle = 127 + round(np.log2(std / 2.9))  # 2.9: that of the sixteen codes
    blocks = rng.integers(0, 256, (*groups, BLOCK // 2), np.uint8)
    return Packed(blocks, rng.integers(middle - 1, middle + 2, groups, np.uint8))


def reference_trace(
    config: ModelConfig,
    weights: dict[str, Stored],
    rows: list[list[int]],
    *,
    dtype: str = "float32",
    pieces: int = 1,
) -> Trace:
    """Every trace point of the reference, rows one after another.

    Args:
        pieces: steps that each row is fed in, beside the same piece of the others.
    """
    backend = ReferenceBackend(config, weights.__getitem__, dtype)
    cache = backend.new_cache(max_tokens=sum(map(len, rows)))
    slots = [cache.open() for _ in rows]
    cuts = [np.linspace(0, len(row), pieces + 1).astype(int).tolist() for row in rows]
    parts: dict[str, list[list[npt.NDArray[Any]]]] = {}
    for step in range(pieces):
        new = [row[cut[step] : cut[step + 1]] for row, cut in zip(rows, cuts, strict=True)]
        every = range(sum(map(len, new)))
        batch = Batch.of(new, [cut[step] for cut in cuts], slots, wanted=every)
        for slot, cut in zip(slots, cuts, strict=True):
            cache.reserve(slot, cut[step + 1])

        def keep(name: str, x: npt.NDArray[Any], starts: Any = batch.starts) -> None:
            mine = parts.setdefault(name, [[] for _ in rows])
            for r, piece in enumerate(np.split(x, starts[1:-1])):
                mine[r].append(piece)

        backend.forward(batch, cache, trace=keep)
    return {name: np.concatenate([p for row in mine for p in row]) for name, mine in parts.items()}


@dataclass(frozen=True, slots=True)
class Golden:
    """What ``runs/make_golden.py`` stored of one case."""

    config: ModelConfig
    weights: dict[str, Stored]
    rows: list[list[int]]
    trace: Trace
    provenance: dict[str, Any]


def golden(name: str) -> Golden:
    """Read one stored trace."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    provenance = json.loads(str(arrays.pop("provenance")))
    parts: dict[str, Trace] = {"weights": {}, "trace": {}}
    for key, x in arrays.items():
        folder, key = key.split("/")
        parts[folder][key] = x
    weights: dict[str, Stored] = {}
    for key, x in parts["weights"].items():
        if key.endswith(".blocks"):
            key = key.removesuffix(".blocks")
            weights[key] = Packed(x, parts["weights"][f"{key}.scales"])
        elif not key.endswith(".scales"):
            weights[key] = x.astype(np.float32)
    config = ModelConfig(**provenance["config"])
    return Golden(config, weights, provenance["tokens"], parts["trace"], provenance)


def errors(ours: Trace, theirs: Trace) -> dict[str, float]:
    """Largest difference at each trace point, in our order, relative to the largest value there.

    Infinite where shapes differ, where integers differ, and where a number is not finite.
    """
    assert set(ours) == set(theirs), f"trace points differ: {set(ours) ^ set(theirs)}"
    return {name: _error(ours[name], theirs[name]) for name in ours}


def _error(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.inf
    if b.dtype.kind in "iu":
        return 0.0 if np.array_equal(a, b) else np.inf
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())


def first_divergence(found: dict[str, float], allowed: float = TOLERANCE) -> str | None:
    """The first trace point whose error is more than allowed."""
    return next((name for name, error in found.items() if not error <= allowed), None)
