"""How far a right answer may be off: the reference again, rounding as a precision rounds.

Its distance from float64 on the very same input is the yardstick. It is as large as it has to be
where a softmax is sharp or a sum cancels, and nowhere larger.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gptoss.backends import CACHES, is_narrow
from gptoss.model.config import ModelConfig
from gptoss.model.reference import NDArray, NumpyOps, softmax, swiglu, unpack

LARGE = ("qkv.weight", "out.weight", "unembedding.weight")  # what "fast" rounds to 8 bits
MLX = {"fast": 8, "small": 4}  # bits of large matrices in mlx
GROUP = 32  # numbers that share a scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What is rounded, beyond float32, and to how many bits."""

    name: str
    results: bool = False  # of every operation, to bfloat16
    dense: int | None = None  # large matrices: bits, a scale to each group
    inputs: int | None = None  # what those multiply: bits, a scale to each group
    experts: int | None = None  # what packed experts multiply: bits, a scale to each group
    kv: str = "float32"  # keys and values, one of CACHES

    def result(self, x: NDArray) -> NDArray:
        """What an operation gives."""
        return bfloat16(x) if self.results else x

    def kept(self, x: NDArray) -> NDArray:
        """Keys or values, as the cache keeps them."""
        assert self.kv in CACHES
        match self.kv:
            case "bfloat16":
                return bfloat16(x)
            case "int8":
                return scaled(x, 8, x.shape[-1])
        return x

    def weight(self, name: str, x: NDArray) -> NDArray:
        """A dense matrix, by its canonical name, as it is held."""
        if self.dense is not None and name.endswith(LARGE):
            return scaled(x, self.dense).view(Coarse)
        return x


class Coarse(np.ndarray):
    """A matrix that is multiplied with rounded activations."""


def precision_of(
    config: ModelConfig, backend: str, dtype: str | None, precision: str | None, kv: str | None
) -> Precision:
    """What a backend's options come to; None stands for its default."""
    if backend != "native":
        narrow = (dtype or ("float32" if backend == "reference" else "bfloat16")) == "bfloat16"
        name = "bfloat16" if narrow else "float32"
        dense = MLX.get(precision or "exact")
        return Precision(name=name, results=narrow, dense=dense, kv=kv or "float32")
    wide = not is_narrow(config)
    if precision == "exact" or not wide:
        return Precision(name="exact", experts=16 if wide else None, kv=kv or "float32")
    return Precision(name="fast", dense=8, inputs=8, experts=8, kv=kv or "bfloat16")


def bfloat16(x: NDArray) -> NDArray:
    """The nearest bfloat16, in the dtype of x."""
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


def scaled(x: NDArray, bits: int, group: int = GROUP) -> NDArray:
    """Whole numbers of so many bits, times a scale for each group along the last axis."""
    columns = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % group)])
    groups = padded.reshape(*x.shape[:-1], -1, group)
    unit = np.abs(groups).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    unit = np.where(unit > 0, unit, 1.0).astype(x.dtype)
    rounded: NDArray = (np.round(groups / unit) * unit).reshape(padded.shape)[..., :columns]
    return rounded


class RoundedOps(NumpyOps):
    """The reference's operations in float32 and rounded; the router's choice is given to it."""

    def __init__(self, precision: Precision, chosen: NDArray | None = None) -> None:
        self.precision, self.chosen = precision, chosen

    def rms_norm(self, x: NDArray, scale: NDArray, eps: float) -> NDArray:
        """See ``Ops.rms_norm``."""
        return self.precision.result(super().rms_norm(self.precision.result(x), scale, eps))

    def linear(self, x: NDArray, weight: NDArray, bias: NDArray | None) -> NDArray:
        """See ``Ops.linear``."""
        if isinstance(weight, Coarse) and self.precision.inputs is not None:
            x, weight = scaled(x, self.precision.inputs), weight.view(np.ndarray)
        return self.precision.result(super().linear(x, weight, bias))

    def rope(self, x: NDArray, positions: NDArray, config: ModelConfig) -> NDArray:
        """See ``Ops.rope``."""
        return self.precision.result(super().rope(x, positions, config))

    def route(self, scores: NDArray, k: int) -> tuple[NDArray, NDArray]:
        """See ``Ops.route``."""
        assert self.chosen is not None
        share = softmax(np.take_along_axis(scores, self.chosen, axis=-1))
        return self.chosen, self.precision.result(share)

    def experts(
        self, x: NDArray, w: Any, chosen: NDArray, share: NDArray, config: ModelConfig
    ) -> NDArray:
        """See ``Ops.experts``."""
        each = np.empty((*chosen.shape, x.shape[-1]), x.dtype)
        for e in np.unique(chosen):
            mlp1, mlp2 = unpack(w.mlp1[e], x.dtype), unpack(w.mlp2[e], x.dtype)
            t, i = np.nonzero(chosen == e)
            hidden = self._product(x[t], mlp1) + w.mlp1_bias[e]
            hidden = swiglu(self.precision.result(hidden), config.swiglu_limit)
            hidden = self.precision.result(hidden)
            each[t, i] = self.precision.result(self._product(hidden, mlp2) + w.mlp2_bias[e])
        return self.precision.result((each * share[..., None]).sum(axis=1))

    def reduce(self, x: NDArray) -> NDArray:
        """See ``Ops.reduce``."""
        return x

    def _product(self, x: NDArray, weight: NDArray) -> NDArray:
        bits = self.precision.experts
        return (x if bits is None else scaled(x, bits)) @ weight.T
