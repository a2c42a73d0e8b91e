"""What training adapters on MLX needs: weights with adapters, whole rows, and the loss.

The mathematics, the names and the shapes are those of ``gptoss.train.lora``: W becomes
W + scale * B @ A, where only A and B are trained. W stays as it was loaded, packed or not; MLX
differentiates its packed products by what they multiply. Hu et al. 2021,
https://arxiv.org/abs/2106.09685
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from gptoss.backends.mlx.cache import attend_past
from gptoss.backends.mlx.ops import MlxOps, multiply, product, rotations, wide
from gptoss.model import model
from gptoss.model.config import ModelConfig
from gptoss.model.weights import Block, Weights, specs

ADAPTED = {  # canonical tail -> what the trained module is called
    "attn.qkv.weight": "attn.qkv",
    "attn.out.weight": "attn.out",
    "mlp.mlp1_weight": "mlp.experts.mlp1_weight",
    "mlp.mlp2_weight": "mlp.experts.mlp2_weight",
}
CHUNK = 1 << 24  # logits at a time
OPS = MlxOps()
Ints = npt.NDArray[np.int64]
ROUTED = (".mlp.gate", ".mlp.chosen")  # trace points that a checkpointed layer still shows
Pairs = list[tuple[mx.array, mx.array]]  # a, and b scaled, in the order of ``ADAPTED``
Adapters = Mapping[str, mx.array]  # by name: .a [..., r, columns], .b [..., rows, r]


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix, or a stack of experts' matrices, with an adapter."""

    base: Any
    a: mx.array
    b: mx.array  # scaled

    def product(self, x: mx.array) -> mx.array:
        """[T, columns] -> [T, rows]."""
        found = product(x, self.base)
        small = (x @ self.a.astype(x.dtype).T) @ self.b.astype(x.dtype).T
        return found + small.astype(found.dtype)

    def multiply(self, x: mx.array, which: mx.array, *, ordered: bool) -> mx.array:
        """See ``PackedArray.multiply``."""
        found = multiply(x, self.base, which, ordered=ordered)
        small = multiply(x, self.a, which, ordered=ordered)
        return found + multiply(small, self.b, which, ordered=ordered).astype(found.dtype)


@dataclass(frozen=True, slots=True)
class Surprise:
    """Stands in for the unembedding: log-probabilities of the targets, some rows at a time.

    Logits are computed again on the way back, and never held all together.
    """

    table: mx.array  # [V, D]
    targets: mx.array  # int [W]

    def product(self, x: mx.array) -> mx.array:
        """[W, D] -> float32 [W]."""
        rows = max(1, CHUNK // self.table.shape[0])
        parts = [slice(i, i + rows) for i in range(0, x.shape[0], rows)]
        return mx.concatenate([mx.checkpoint(partial(self._some, p))(x[p]) for p in parts])

    def _some(self, part: slice, x: mx.array) -> mx.array:
        logits = wide(product(x, self.table))
        said = mx.take_along_axis(logits, self.targets[part, None], axis=-1).squeeze(-1)
        return said - mx.logsumexp(logits, axis=-1)


class WholeRows:
    """``KV`` of rows that are all new, one after another; nothing is kept."""

    def __init__(self, lengths: Sequence[int]) -> None:
        ends = np.cumsum([0, *lengths]).tolist()
        self.rows = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def attend(
        self,
        layer: int,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        sinks: mx.array,
        window: int | None,
    ) -> mx.array:
        """See ``KV.attend``."""
        q, k, v = (x.swapaxes(0, 1)[None] for x in (q, k, v))  # [1, heads, T, d]
        outs = []
        for r in self.rows:
            outs += attend_past(q[:, :, r], k[:, :, r], v[:, :, r], sinks, window)
        return mx.concatenate(outs, axis=2)[0].swapaxes(0, 1)


def logprobs(
    weights: Weights,
    config: ModelConfig,
    tokens: Ints,
    lengths: Sequence[int],
    wanted: Ints,
    targets: Ints,
    trace: model.Trace = model.no_trace,
    layer: Callable[..., mx.array] | None = None,
) -> mx.array:
    """float32 [W]: what ``gptoss.train.loss.score`` gives, differentiable by the adapters.

    Args:
        tokens: [T], rows of these ``lengths``, one after another.
        wanted: [W], the tokens after which something is scored.
        targets: [W], what.
        layer: ``recomputed``, or None.
    """
    head = Surprise(weights.unembedding, mx.array(targets))
    positions = np.concatenate([np.arange(n) for n in lengths])
    found: mx.array = model.forward(
        replace(weights, unembedding=head),
        mx.array(tokens),
        rotations(positions, config),
        mx.array(wanted),
        kv=WholeRows(lengths),
        ops=OPS,
        config=config,
        trace=trace,
        layer=layer,
    )
    return found


def adapters(config: ModelConfig, rank: int, seed: int) -> dict[str, mx.array]:
    """New ones, float32, by the names they have in a run: they change nothing yet."""
    draw, found = np.random.Generator(np.random.Philox(seed)), {}
    for spec in specs(config):
        prefix, tail = spec.name[: spec.name.find(".", 6) + 1], ".".join(spec.name.split(".")[2:])
        if tail in ADAPTED:
            *stack, rows, columns = spec.shape
            a = draw.standard_normal((*stack, rank, columns), np.float32) / math.sqrt(columns)
            found[f"{prefix}{ADAPTED[tail]}.a"] = mx.array(a)
            found[f"{prefix}{ADAPTED[tail]}.b"] = mx.zeros((*stack, rows, rank))
    return found


def adapted(weights: Weights, given: Adapters, scale: float) -> Weights:
    """``weights`` with adapters, which count ``scale``."""
    blocks = []
    for i, block in enumerate(weights.block):
        names = [f"block.{i}.{name}" for name in ADAPTED.values()]
        pairs = [(given[f"{name}.a"], scale * given[f"{name}.b"]) for name in names]
        blocks.append(_dressed(block, bases(block), pairs))
    return replace(weights, block=blocks)


def recomputed(w: Block, x: mx.array, *rest: Any) -> mx.array:
    """``model.decode_block`` that keeps nothing inside and is computed again on the way back."""
    positions, layer, kv, ops, config, trace, *wanted = rest
    whole = bases(w)

    def inside(x: mx.array, pairs: Pairs) -> tuple[mx.array, dict[str, mx.array]]:
        seen: dict[str, mx.array] = {}
        block = _dressed(w, [one.base for one in whole], pairs)
        see = seen.__setitem__
        out = model.decode_block(block, x, positions, layer, kv, ops, config, see, *wanted)
        return out, {name: value for name, value in seen.items() if name.endswith(ROUTED)}

    out, seen = mx.checkpoint(inside)(x, [(one.a, one.b) for one in whole])
    for name, value in seen.items():
        trace(name, value)
    return out


def bases(block: Block) -> list[Any]:
    """What of a layer is adapted, in the order of ``ADAPTED``."""
    return [block.attn.qkv, block.attn.out, block.mlp.mlp1, block.mlp.mlp2]


def _dressed(block: Block, below: list[Any], pairs: Pairs) -> Block:
    qkv, out, mlp1, mlp2 = (LowRank(w, a, b) for w, (a, b) in zip(below, pairs, strict=True))
    return replace(
        block,
        attn=replace(block.attn, qkv=qkv, out=out),
        mlp=replace(block.mlp, mlp1=mlp1, mlp2=mlp2),
    )
