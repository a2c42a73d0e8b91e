"""The reference a layer at a time: only that layer's weights are in memory, and widened.

Rows are computed whole, all of them together, so that an expert is unpacked once. A trajectory is
what comes in at a layer, of every token, and what the layer makes of it.
"""

from typing import Any

import numpy as np

from gptoss.model import model
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed
from gptoss.model.reference import NDArray, NumpyOps, attend_row, softmax, unpack
from gptoss.model.weights import ATTENTION, MIXTURE, Attention, Block, Mixture, Read
from gptoss.verify.precision import Precision

Points = dict[str, NDArray]
SLICE = 16_384  # rows of the vocabulary whose logits are computed together
SCORES = 1 << 24  # attention scores in memory together
HELD = 4 << 30  # bytes of a layer's unpacked experts that are kept until the layer is done


class Unpacked:
    """A layer's packed experts in float32, each unpacked when it is first chosen.

    MXFP4's values are the same numbers in float32.
    """

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.known: dict[int, NDArray] = {}
        self.keep = 4 * int(np.prod(packed.shape)) <= HELD // 2

    def __getitem__(self, e: int) -> NDArray:
        if e in self.known:
            return self.known[e]
        expert = self.packed[e].decode(np.float32)
        if self.keep:
            self.known[e] = expert
        return expert


def layer_experts(read: Read, layer: int) -> dict[str, Any]:
    """One layer's experts, as ``NumpyOps.experts`` can take them, by the tails of their names."""
    found: dict[str, Any] = {}
    for name in ("mlp.mlp1_weight", "mlp.mlp2_weight"):
        stored = read(f"block.{layer}.{name}")
        found[name] = Unpacked(stored) if isinstance(stored, Packed) else stored
    return found


def dense(read: Read, name: str) -> NDArray:
    """A tensor that is never packed, as stored."""
    stored = read(name)
    assert isinstance(stored, np.ndarray)
    return stored


def slices(config: ModelConfig) -> list[slice]:
    """Of the vocabulary, some rows at a time."""
    size = config.vocab_size
    return [slice(i, min(i + SLICE, size)) for i in range(0, size, SLICE)]


def load_block(
    read: Read, layer: int, experts: dict[str, Any], dtype: Any, precision: Precision | None = None
) -> Block:
    """One layer's weights in ``dtype``, its experts shared, rounded as ``precision`` holds them."""

    def tensor(name: str) -> Any:
        if name in experts:
            return experts[name]
        wide = unpack(read(f"block.{layer}.{name}"), dtype)
        return wide if precision is None else precision.weight(name, wide)

    return Block(
        Attention(**{a: tensor(f"attn.{n}") for a, n in ATTENTION.items()}),
        Mixture(**{a: tensor(f"mlp.{n}") for a, n in MIXTURE.items()}),
    )


class WholeRows:
    """``KV`` of rows that begin in this step and end in it, some queries at a time."""

    def __init__(self, starts: NDArray, precision: Precision | None = None) -> None:
        self.starts, self.precision = starts, precision

    def attend(
        self, layer: int, q: NDArray, k: NDArray, v: NDArray, sinks: NDArray, window: int | None
    ) -> NDArray:
        """See ``KV.attend``."""
        if self.precision is not None:
            k, v = self.precision.kept(k), self.precision.kept(v)
        out = np.empty_like(q)
        for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True):
            step = max(1, SCORES // (q.shape[1] * (stop - start)))
            for first in range(start, stop, step):
                last = min(first + step, stop)
                out[first:last] = attend_row(
                    q[first:last], k[start:last], v[start:last], sinks, window
                )
        return out if self.precision is None else self.precision.result(out)


class SteeredOps(NumpyOps):
    """The reference's operations, but routing as another has routed where that has its reasons."""

    def __init__(self, wish: NDArray | None = None, follow: NDArray | None = None) -> None:
        """``wish``: [T, k] experts; ``follow``: [T] bool, whether a token goes there."""
        self.wish, self.follow = wish, follow

    def route(self, scores: NDArray, k: int) -> tuple[NDArray, NDArray]:
        """See ``Ops.route``."""
        own, share = super().route(scores, k)
        if self.wish is None or self.follow is None:
            return own, share
        chosen: NDArray = np.where(self.follow[:, None], self.wish, own)
        return chosen, softmax(np.take_along_axis(scores, chosen, axis=-1))


def run_layer(
    block: Block,
    layer: int,
    x: NDArray,
    starts: NDArray,
    config: ModelConfig,
    ops: NumpyOps,
    precision: Precision | None = None,
) -> Points:
    """Every trace point of one layer, by its name, on the input x: [T, D]."""
    points: Points = {}
    positions = np.arange(len(x)) - np.repeat(starts[:-1], np.diff(starts))
    kv = WholeRows(starts, precision)
    model.decode_block(block, x, positions, layer, kv, ops, config, points.__setitem__)
    if precision is not None:
        for name in (f"block.{layer}.attn", f"block.{layer}"):
            points[name] = precision.result(points[name])
    return points


def regret(scores: NDArray, chosen: NDArray) -> NDArray:
    """[T]: by how much the experts chosen are not the best by these scores, nor in their order."""
    k = chosen.shape[-1]
    best = -np.sort(-scores, axis=-1)[:, :k]
    apart = (best - np.take_along_axis(scores, chosen, axis=-1)).max(axis=-1)
    twice = (np.diff(np.sort(chosen, axis=-1), axis=-1) == 0).any(axis=-1)
    return np.where(twice, np.inf, apart)


def rerouted(
    true: Points, layer: int, chosen: NDArray, block: Block, config: ModelConfig
) -> Points:
    """What the reference's layer gives where another has chosen other experts, of equal rank."""
    here = f"block.{layer}.mlp"
    other = np.flatnonzero((chosen != true[f"{here}.chosen"]).any(axis=-1))
    if not len(other):
        return true
    new = {
        name: x.copy() if name.startswith(here) or name == f"block.{layer}" else x
        for name, x in true.items()
    }
    share = softmax(np.take_along_axis(true[f"{here}.gate"][other], chosen[other], axis=-1))
    out = NumpyOps().experts(true[f"{here}.norm"][other], block.mlp, chosen[other], share, config)
    new[f"{here}.chosen"][other], new[f"{here}.share"][other] = chosen[other], share
    new[f"{here}.out"][other] = out
    new[f"block.{layer}"][other] = true[f"block.{layer}.attn"][other] + out
    return new
