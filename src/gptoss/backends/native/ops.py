"""``Ops`` over the compiled core. Values are float32 arrays; what they cost is said in csrc/."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss import _core
from gptoss.backends.native.resident import Resident
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed
from gptoss.model.reference import rope_tables

Floats = npt.NDArray[np.float32]


class NativeOps:
    """``Ops`` in C++, with NumPy for what only moves or compares a few numbers."""

    def __init__(self, resident: Resident | None = None) -> None:
        """``resident``: what keeps experts within a budget of memory; None: nothing does."""
        self.resident = resident
        self.turned: tuple[Any, Floats, Floats] | None = None  # positions, cos, sin

    def gather(self, table: Any, rows: npt.NDArray[np.int32]) -> Floats:
        """See ``Ops.gather``."""
        if table.dtype.name not in ("bfloat16", "float32"):
            return widened(table[rows])
        bits = table.view(np.uint16) if table.dtype.name == "bfloat16" else table
        out = np.empty((len(rows), table.shape[1]), np.float32)
        _core.gather(bits, np.asarray(rows, np.int32), out)
        return out

    def rms_norm(self, x: Floats, scale: Floats, eps: float) -> Floats:
        """See ``Ops.rms_norm``."""
        out = np.empty_like(x)
        _core.rms_norm(x, scale, eps, out)
        return out

    def linear(self, x: Floats, weight: Any, bias: Floats | None) -> Floats:
        """See ``Ops.linear``. ``weight`` is a ``_core.Weight``."""
        out = np.empty((len(x), weight.rows), np.float32)
        _core.linear(x, weight, bias, out)
        return out

    def rope(self, x: Floats, positions: npt.NDArray[np.int32], config: ModelConfig) -> Floats:
        """See ``Ops.rope``. The tables of a step are made once, for all its layers."""
        if self.turned is None or self.turned[0] is not positions:
            cos, sin = rope_tables(positions, config, np.float32)
            self.turned = positions, cos[:, 0], sin[:, 0]
        out = np.empty(x.shape, np.float32)
        _core.rope(x, self.turned[1], self.turned[2], out)
        return out

    def route(self, scores: Floats, k: int) -> tuple[npt.NDArray[np.int32], Floats]:
        """See ``Ops.route``."""
        shape = len(scores), k
        chosen, share = np.empty(shape, np.int32), np.empty(shape, np.float32)
        _core.route(scores, chosen, share)
        return chosen, share

    def experts(
        self, x: Floats, w: Any, chosen: npt.NDArray[np.int32], share: Floats, config: ModelConfig
    ) -> Floats:
        """See ``Ops.experts``."""
        if self.resident is not None:
            self.resident.use((w.mlp1, w.mlp2), chosen)
        out = np.empty_like(x)
        limit = config.swiglu_limit
        _core.experts(x, w.mlp1, w.mlp1_bias, w.mlp2, w.mlp2_bias, chosen, share, limit, out)
        return out

    def reduce(self, x: Floats) -> Floats:
        """See ``Ops.reduce``."""
        return x


def widened(x: npt.NDArray[Any]) -> Floats:
    """The same numbers in float32."""
    if x.dtype.name == "bfloat16":
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(x, np.float32)


def weight(stored: npt.NDArray[Any] | Packed) -> Any:
    """A ``_core.Weight`` over the memory of an array or of packed experts, [..., rows, columns].

    Leading dimensions become rows. What is neither float32 nor bfloat16 is copied to float32.
    """
    if isinstance(stored, Packed):
        *lead, columns = stored.shape
        blocks, scales = np.ascontiguousarray(stored.blocks), np.ascontiguousarray(stored.scales)
        return _core.Weight(blocks, scales, int(np.prod(lead)), columns, "mxfp4")
    if stored.dtype.name not in ("bfloat16", "float32"):
        stored = stored.astype(np.float32)
    *lead, columns = stored.shape
    rows, format = int(np.prod(lead)), stored.dtype.name
    stored = np.ascontiguousarray(stored)
    return _core.Weight(
        stored.view(np.uint16) if format == "bfloat16" else stored, None, rows, columns, format
    )
