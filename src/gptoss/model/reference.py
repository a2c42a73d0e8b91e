"""The eight operations in NumPy: what every other implementation is judged by.

Slow on purpose. No blocking, no fusing, no in-place tricks; float32 or float64 by the dtype of the
weights it is given. If a line here needs a comment to be believed, the line is wrong.
"""

from typing import Any

import numpy as np

from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed

NDArray = Any  # np.ndarray of float32 or float64


class NumpyOps:
    """``Ops`` in NumPy."""

    def gather(self, table: NDArray, rows: NDArray) -> NDArray:
        """See ``Ops.gather``."""
        return table[rows]

    def rms_norm(self, x: NDArray, scale: NDArray, eps: float) -> NDArray:
        """See ``Ops.rms_norm``. Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467."""
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale

    def linear(self, x: NDArray, weight: NDArray, bias: NDArray | None) -> NDArray:
        """See ``Ops.linear``."""
        return x @ weight.T if bias is None else x @ weight.T + bias

    def rope(self, x: NDArray, positions: NDArray, config: ModelConfig) -> NDArray:
        """See ``Ops.rope``. Su et al. 2021, https://arxiv.org/abs/2104.09864."""
        cos, sin = rope_tables(positions, config, x.dtype)  # [T, 1, d/2]
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def route(self, scores: NDArray, k: int) -> tuple[NDArray, NDArray]:
        """See ``Ops.route``."""
        chosen = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
        return chosen, softmax(np.take_along_axis(scores, chosen, axis=-1))

    def experts(
        self, x: NDArray, w: Any, chosen: NDArray, share: NDArray, config: ModelConfig
    ) -> NDArray:
        """See ``Ops.experts``. A token's experts are added best first."""
        each = np.empty((*chosen.shape, x.shape[-1]), x.dtype)  # [T, k, D]
        for e in np.unique(chosen):
            mlp1, mlp2 = unpack(w.mlp1[e], x.dtype), unpack(w.mlp2[e], x.dtype)
            t, i = np.nonzero(chosen == e)  # the tokens that chose e, and as their how-manieth
            hidden = swiglu(x[t] @ mlp1.T + w.mlp1_bias[e], config.swiglu_limit)  # [n, F]
            each[t, i] = hidden @ mlp2.T + w.mlp2_bias[e]  # [n, D]
        return (each * share[..., None]).sum(axis=1)

    def reduce(self, x: NDArray) -> NDArray:
        """See ``Ops.reduce``."""
        return x


def unpack(matrix: NDArray | Packed, dtype: Any) -> NDArray:
    """One expert's matrix as numbers: decoded if it is packed, cast if it is narrower."""
    return matrix.decode(dtype) if isinstance(matrix, Packed) else matrix.astype(dtype, copy=False)


def softmax(x: NDArray) -> NDArray:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def swiglu(x: NDArray, limit: float) -> NDArray:
    """gpt-oss's own SwiGLU: [..., 2F] -> [..., F].

    Differs from the usual one in three ways (model card, section 2.2): gate and linear halves are
    interleaved, both are clamped to ``limit`` (the gate only from above), and the linear half
    gets +1. The 1.702 is the constant of the sigmoid approximation of GELU.
    """
    gate, linear = x[..., ::2], x[..., 1::2]
    gate, linear = np.minimum(gate, limit), np.clip(linear, -limit, limit)
    with np.errstate(over="ignore"):  # a very negative gate: exp overflows to inf, the ratio is 0
        return gate / (1.0 + np.exp(-1.702 * gate)) * (linear + 1.0)


def rope_tables(positions: NDArray, config: ModelConfig, dtype: Any) -> tuple[NDArray, NDArray]:
    """cos, sin of shape [T, 1, d/2] for the given positions, computed in float64.

    YaRN: Peng et al. 2023, https://arxiv.org/abs/2309.00071, with a range that is not rounded.
    """
    half = config.head_dim // 2
    freq = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    concentration = 1.0
    if config.rope_scaling_factor > 1.0:
        concentration = 0.1 * np.log(config.rope_scaling_factor) + 1.0
        low, high = config.yarn_range
        ramp = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
        freq = freq * (1.0 - ramp) + freq / config.rope_scaling_factor * ramp
    angle = np.asarray(positions)[:, None, None] * freq
    return (
        (np.cos(angle) * concentration).astype(dtype),
        (np.sin(angle) * concentration).astype(dtype),
    )


def attend_row(q: NDArray, k: NDArray, v: NDArray, sinks: NDArray, window: int | None) -> NDArray:
    """Causal attention of one row's newest tokens to its whole past.

    Args:
        q: [t, H, d], the newest t tokens.
        k, v: [n, K, d], all n >= t tokens of the row, oldest first.
        sinks: [H], a logit per head that takes probability and gives nothing back
            (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).
        window: how many keys each query sees, its own included (None: all).

    Returns:
        [t, H, d].
    """
    t, H, d = q.shape
    n, K, _ = k.shape
    k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)  # [n, H, d]
    scores = np.einsum("thd,nhd->htn", q, k, optimize=True) * d**-0.5
    age = np.arange(n - t, n)[:, None] - np.arange(n)[None, :]  # [t, n], 0 is "now"
    hidden = age < 0 if window is None else (age < 0) | (age >= window)
    scores = np.where(hidden, -np.inf, scores)
    sink = np.broadcast_to(sinks[:, None, None], (H, t, 1))
    share = softmax(np.concatenate([scores, sink], axis=-1))[..., :-1]  # [H, t, n]
    return np.einsum("htn,nhd->thd", share, v, optimize=True).astype(q.dtype)
