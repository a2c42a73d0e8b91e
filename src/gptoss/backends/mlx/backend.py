"""``Backend`` over MLX arrays, on Apple's GPU or a CPU."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from gptoss.backends.mlx.cache import MlxCache, MlxView
from gptoss.backends.mlx.ops import GROUP, AffineArray, MlxOps, PackedArray, on_cpu, rotations
from gptoss.backends.protocol import Batch, Cache, Sampling
from gptoss.backends.sampling import sample_rows
from gptoss.checkpoint.pieces import forget
from gptoss.errors import BackendUnavailable
from gptoss.model import model
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK, Packed
from gptoss.model.weights import Read, build

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
BITS = {"exact": None, "fast": 8, "small": 4}  # of the matrices that every token passes through
PIECE = 32 << 20  # bytes of a file that are cast together
DENSE = ("qkv.weight", "out.weight", "unembedding.weight")


class MlxBackend:
    """Runs ``model.forward`` with ``MlxOps``.

    Packed experts stay as published; the rest is cast once, or rounded as ``precision`` says.
    Tensors are taken one at a time, and what was read of their file is given back: loading needs
    the memory of the model and of its largest tensor.

    Raises:
        ValueError: an unknown dtype, precision or device.
        BackendUnavailable: the GPU asked for on a machine for which MLX has none.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Read,
        dtype: str = "bfloat16",
        device: str = "cpu",
        precision: str = "exact",
        kv: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"mlx computes in {', '.join(DTYPES)}, not {dtype}")
        if precision not in BITS:
            raise ValueError(f"precision of mlx is one of {', '.join(BITS)}, not {precision!r}")
        if kv not in (None, "int8"):
            raise ValueError(f"mlx keeps keys and values in its dtype or in int8, not in {kv}")
        if kv == "int8" and config.head_dim % BLOCK:
            raise ValueError(
                f"int8 keys and values need heads of a multiple of {BLOCK}, not {config.head_dim}"
            )
        group = GROUP if config.head_dim % GROUP == 0 else BLOCK
        self.group = group if kv == "int8" else None
        self.config, self.dtype, self.bits = config, DTYPES[dtype], BITS[precision]
        self.device, self.ops = open_device(device), MlxOps()
        with mx.stream(self.device):
            self.weights = build(config, lambda name: self._load(name, read(name)))

    def new_cache(self, *, max_tokens: int) -> MlxCache:
        """See ``Backend.new_cache``."""
        with mx.stream(self.device):
            return MlxCache(self.config, max_tokens, self.dtype, self.group)

    def forward(self, batch: Batch, cache: Cache, trace: model.Trace | None = None) -> mx.array:
        """See ``Backend.forward``. A trace sees float32: NumPy cannot take bfloat16 from MLX."""
        assert isinstance(cache, MlxCache)
        batch.check(self.config)
        see = model.no_trace if trace is None else lambda name, x: trace(name, readable(x))
        with mx.stream(self.device):
            kv = MlxView(cache, batch)
            logits: mx.array = model.forward(
                self.weights,
                mx.array(batch.tokens),
                rotations(batch.positions, self.config),
                mx.array(batch.wanted),
                kv=kv,
                ops=self.ops,
                config=self.config,
                trace=see,
            )
            if not len(batch.wanted):  # of the last layer, nothing but keys and values
                logits = mx.zeros(logits.shape, logits.dtype)
            mx.eval(logits, kv.arrays)  # another thread may ask for the next step
        return logits

    def sample(
        self, logits: mx.array, rules: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int]:
        """See ``Backend.sample``."""
        return sample_rows(self.to_numpy(logits), rules, uniforms)

    def to_numpy(self, logits: mx.array) -> npt.NDArray[np.float32]:
        """See ``Backend.to_numpy``."""
        with mx.stream(self.device):
            return np.array(readable(logits))

    def _load(self, name: str, stored: Any) -> Any:
        """A tensor on the device, computed now: what it was read from is not needed again."""
        if isinstance(stored, Packed):
            packed = PackedArray.of(stored)
            mx.eval(packed.words, packed.scales)
            forget(stored.blocks)
            return packed
        dense, dtype = name.endswith(DENSE), self._dtype_of(name)
        if dense and on_cpu() and dtype == mx.float32 and self.bits is None:
            return cast(stored, dtype, across=True)
        x = cast(stored, dtype)
        if self.bits and dense and x.shape[-1] % BLOCK == 0:
            rounded = AffineArray.of(x, self.bits)
            mx.eval(rounded.words, rounded.scales, rounded.offsets)
            return rounded
        return x

    def _dtype_of(self, name: str) -> mx.Dtype:
        """In what a tensor is kept; on a CPU, MLX multiplies stacks of matrices in float32 only."""
        stack = name.endswith(("mlp1_weight", "mlp2_weight"))
        wide = name.endswith("norm.scale") or (stack and on_cpu())
        return mx.float32 if wide else self.dtype


def cast(stored: Any, dtype: mx.Dtype, *, across: bool = False) -> mx.array:
    """A tensor in ``dtype``, some rows at a time: never in both in whole.

    ``across``: a matrix that lies in memory column by column, by which a CPU multiplies in half
    the time: its sums then run along many rows at once.
    """
    x = mx.zeros(stored.shape[::-1] if across else stored.shape, dtype)
    step = max(1, PIECE * len(stored) // stored.nbytes)
    for i in range(0, len(stored), step):
        rows = mx.array(stored[i : i + step]).astype(dtype)
        if across:
            x[:, i : i + step] = mx.contiguous(rows.T)
        else:
            x[i : i + step] = rows
        mx.eval(x)
        forget(stored)
    x = x.T if across else x
    mx.eval(x)
    return x


def readable(x: mx.array) -> mx.array:
    """``x`` as NumPy can take it."""
    return x.astype(mx.float32) if x.dtype == mx.bfloat16 else x


def open_device(name: str) -> mx.Device:
    """The device called ``name``: "cpu" or "gpu". A GPU's weights may stay wired in memory, which
    macOS otherwise pages out between requests.
    """
    if name not in ("cpu", "gpu"):
        raise ValueError(f"mlx runs on cpu or gpu, not {name!r}")
    device = mx.Device(getattr(mx, name))
    if not mx.is_available(device):
        raise BackendUnavailable("'gpu' was asked for, but MLX finds none on this machine")
    if name == "gpu" and mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    return device
