"""``Ops`` in MLX: lazy, on Apple's GPU or a CPU, in float32 or bfloat16.

Norms, rotations, the router's softmax, the activation and the sum over experts are computed in
float32. MLX multiplies by packed matrices itself: by experts in MXFP4 as published, by the others
in its affine form where the load rounded them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK, Packed
from gptoss.model.reference import rope_tables

MANY = 64  # visits of experts from which sorting them by expert is worth it
GROUP = 64  # values of an affine matrix that share a scale and an offset
STRIP = 8192  # rows rounded together: in float32 the unembedding alone would take gigabytes


@dataclass(frozen=True, slots=True)
class PackedArray:
    """A stack of MXFP4 matrices, byte for byte as published: eight nibbles are a word of MLX's."""

    words: mx.array  # uint32 [E, rows, columns / 8]
    scales: mx.array  # uint8 [E, rows, columns / 32]

    @classmethod
    def of(cls, packed: Packed) -> "PackedArray":
        """A copy of the same bytes; the low nibble is the even index in either world."""
        flat = np.ascontiguousarray(packed.blocks).reshape(*packed.blocks.shape[:-2], -1)
        return cls(mx.array(flat).view(mx.uint32), mx.array(packed.scales))

    def multiply(self, x: mx.array, which: mx.array, *, ordered: bool) -> mx.array:
        """x [N, 1, columns] by matrix ``which[n]`` of the stack -> [N, 1, rows].

        On the CPU in float32 whatever x is: MLX's kernel is ten times slower in bfloat16 there.
        """
        return mx.gather_qmm(
            wide(x) if on_cpu() else x,
            self.words,
            self.scales,
            rhs_indices=which,
            transpose=True,
            group_size=BLOCK,
            bits=4,
            mode="mxfp4",
            sorted_indices=ordered,
        )


@dataclass(frozen=True, slots=True)
class AffineArray:
    """A matrix rounded to 4 or 8 bits: ``scale * integer + offset``, by groups along a row."""

    words: mx.array  # uint32 [rows, columns * bits / 32]
    scales: mx.array  # [rows, columns / group]
    offsets: mx.array  # as scales
    group: int
    bits: int

    @classmethod
    def of(cls, x: mx.array, bits: int) -> "AffineArray":
        """x [rows, columns], columns a multiple of 32, rounded to nearest.

        On the CPU the scales are float32, for the reason that ``PackedArray`` gives.
        """
        group = GROUP if x.shape[-1] % GROUP == 0 else 32
        parts = []
        for i in range(0, x.shape[0], STRIP):
            rows = x[i : i + STRIP]
            parts.append(mx.quantize(wide(rows) if on_cpu() else rows, group, bits))
            mx.eval(parts[-1])
        words, scales, offsets = (mx.concatenate(list(part)) for part in zip(*parts, strict=True))
        return cls(words, scales, offsets, group, bits)

    def product(self, x: mx.array) -> mx.array:
        """[T, columns] -> [T, rows]."""
        if not x.shape[0]:  # of which MLX's kernel dies
            return mx.zeros((0, self.words.shape[0]), x.dtype)
        out = mx.quantized_matmul(
            x.astype(self.scales.dtype),
            self.words,
            self.scales,
            self.offsets,
            transpose=True,
            group_size=self.group,
            bits=self.bits,
        )
        return out.astype(x.dtype)


class MlxOps:
    """``Ops`` in MLX."""

    def gather(self, table: mx.array, rows: mx.array) -> mx.array:
        """See ``Ops.gather``."""
        return table[rows]

    def rms_norm(self, x: mx.array, scale: mx.array, eps: float) -> mx.array:
        """See ``Ops.rms_norm``."""
        return mx.fast.rms_norm(wide(x), scale, eps).astype(x.dtype)

    def linear(self, x: mx.array, weight: Any, bias: mx.array | None) -> mx.array:
        """See ``Ops.linear``."""
        if bias is None:
            return product(x, weight)
        if isinstance(weight, mx.array):
            return mx.addmm(bias, x, weight.T)
        return product(x, weight) + bias

    def rope(
        self, x: mx.array, positions: tuple[mx.array, mx.array], config: ModelConfig
    ) -> mx.array:
        """See ``Ops.rope``; of the positions, their ``rotations``, which all layers share."""
        half = config.head_dim // 2
        a, b = wide(x[..., :half]), wide(x[..., half:])
        return mx.concatenate(fused(_rotate)(a, b, *positions), axis=-1).astype(x.dtype)

    def route(self, scores: mx.array, k: int) -> tuple[mx.array, mx.array]:
        """See ``Ops.route``. MLX sorts stably; its ``topk`` promises no order."""
        chosen = mx.stop_gradient(mx.argsort(-scores, axis=-1)[:, :k])
        best = mx.take_along_axis(wide(scores), chosen, axis=-1)
        return chosen, mx.softmax(best, axis=-1)

    def experts(
        self, x: mx.array, w: Any, chosen: mx.array, share: mx.array, config: ModelConfig
    ) -> mx.array:
        """See ``Ops.experts``. Many visits are sorted, so that an expert is read once for all."""
        T, k = chosen.shape
        if not T:
            return x
        visits = chosen.reshape(-1)  # [N], N = T * k
        order = mx.argsort(visits) if (many := T * k >= MANY) else mx.arange(T * k)
        which = visits[order]
        hidden = multiply(x[order // k][:, None], w.mlp1, which, ordered=many)
        hidden = swiglu(hidden + w.mlp1_bias[which][:, None], config.swiglu_limit)  # [N, 1, F]
        each = multiply(hidden.astype(x.dtype), w.mlp2, which, ordered=many)
        each = each + w.mlp2_bias[which][:, None]  # [N, 1, D]
        if many:
            each = each[mx.argsort(order)]
        each = each.reshape(T, k, -1)
        return (wide(each) * share[..., None]).sum(axis=1).astype(x.dtype)

    def reduce(self, x: mx.array) -> mx.array:
        """See ``Ops.reduce``."""
        return x


def product(x: mx.array, weight: Any) -> mx.array:
    """x [T, columns] by a matrix [rows, columns], or what has a ``product`` -> [T, rows]."""
    if isinstance(weight, mx.array):
        return x @ weight.T
    found: mx.array = weight.product(x)
    return found


def multiply(x: mx.array, stack: Any, which: mx.array, *, ordered: bool) -> mx.array:
    """x [N, 1, columns] by matrix ``which[n]`` of a stack [E, rows, columns] -> [N, 1, rows]."""
    if not isinstance(stack, mx.array):
        found: mx.array = stack.multiply(x, which, ordered=ordered)
        return found
    return mx.gather_mm(
        x.astype(stack.dtype), stack.swapaxes(-1, -2), rhs_indices=which, sorted_indices=ordered
    )


def swiglu(x: mx.array, limit: float) -> mx.array:
    """See ``gptoss.model.reference.swiglu``: [..., 2F] -> float32 [..., F]."""
    activated: mx.array = fused(_activate)(wide(x[..., ::2]), wide(x[..., 1::2]), mx.array(limit))
    return activated


def rotations(positions: Any, config: ModelConfig) -> tuple[mx.array, mx.array]:
    """cos, sin float32 [T, 1, d/2] of int [T] positions, from angles in float64.

    MLX's own ``fast.rope`` multiplies position and frequency in float32: at token 131,071 what it
    rotates is off by 2e-3.
    """
    cos, sin = rope_tables(positions, config, np.float32)
    return mx.array(cos), mx.array(sin)


def wide(x: mx.array) -> mx.array:
    """``x`` in float32."""
    return x.astype(mx.float32)


def on_cpu() -> bool:
    """Whether the stream in use is a CPU's."""
    cpu: bool = mx.default_device() == mx.Device(mx.cpu)
    return cpu


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one kernel on a GPU. On a CPU it gains nothing and would need a compiler."""
    return function if on_cpu() else _compiled(function)


@lru_cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return mx.compile(function, shapeless=True)


def _rotate(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> list[mx.array]:
    return [a * cos - b * sin, b * cos + a * sin]


def _activate(gate: mx.array, up: mx.array, limit: mx.array) -> mx.array:
    gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
    return gate * mx.sigmoid(1.702 * gate) * (up + 1.0)
