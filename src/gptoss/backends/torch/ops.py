"""``Ops`` in PyTorch: eager, differentiable, on any device, in float32, bfloat16 or float64.

Norms, rotations and the router's softmax are computed in float32 at least, whatever the dtype of
the activations; every product is computed in the dtype of the activations.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BIAS, BLOCK, PAIRS, Packed
from gptoss.model.reference import rope_tables
from gptoss.model.weights import Mixture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
IN_CACHE = 1 << 14  # blocks of MXFP4 decoded together: what stays in a core's cache is 10x faster


class TorchOps:
    """``Ops`` in PyTorch."""

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        """See ``Ops.gather``."""
        return F.embedding(rows, table)

    def rms_norm(self, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        """See ``Ops.rms_norm``."""
        return F.rms_norm(wide(x), (x.shape[-1],), wide(scale), eps).to(x.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See ``Ops.linear``."""
        return F.linear(x, weight, bias)

    def rope(self, x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
        """See ``Ops.rope``."""
        cos, sin = rotations(config, wide(x[:0]).dtype, x.device)
        cos, sin = cos[positions], sin[positions]  # [T, 1, d/2]
        a, b = wide(x).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def route(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See ``Ops.route``. A stable sort, because ``torch.topk`` promises no order of ties."""
        best, chosen = wide(scores).sort(dim=-1, descending=True, stable=True)
        return chosen[:, :k], best[:, :k].softmax(dim=-1).to(scores.dtype)

    def experts(
        self, x: Tensor, w: Any, chosen: Tensor, share: Tensor, config: ModelConfig
    ) -> Tensor:
        """See ``Ops.experts``. Visits are grouped by expert: the others cost nothing."""
        T, k = chosen.shape
        visits = chosen.reshape(-1)  # [T * k]
        order = visits.argsort(stable=True)  # by expert, then by token
        counts = visits.bincount(minlength=w.mlp1_bias.shape[0]).tolist()
        groups = torch.split(x.index_select(0, order // k), counts)  # E of [n, D]
        each_w = Mixture(None, None, None, *map(apart, (w.mlp1, w.mlp1_bias, w.mlp2, w.mlp2_bias)))
        outs = [
            expert(group, each_w, e, config.swiglu_limit)
            for e, group in enumerate(groups)
            if len(group)
        ]
        home = torch.empty_like(order)
        home[order] = torch.arange(T * k, device=x.device)
        each = torch.cat(outs).index_select(0, home).view(T, k, -1) if outs else x[:, None]
        return (each * share[..., None].to(each.dtype)).sum(dim=1)

    def reduce(self, x: Tensor) -> Tensor:
        """See ``Ops.reduce``."""
        return x


class PackedTensor(nn.Module):
    """A stack of MXFP4 matrices on the device, as stored: a quarter of bfloat16's bytes.

    A module only so that it moves, and is saved, with the model that owns it.
    """

    blocks: Tensor  # uint8 [..., rows, columns / 32, 16]
    scales: Tensor  # uint8 [..., rows, columns / 32]

    def __init__(self, blocks: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("blocks", blocks)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, packed: Packed, device: torch.device | str = "cpu") -> "PackedTensor":
        """The same bytes on ``device``; on the CPU not even copied."""
        return cls(from_numpy(packed.blocks, device), from_numpy(packed.scales, device))

    @classmethod
    def zeros(cls, *shape: int) -> "PackedTensor":
        """Room for [..., rows, columns] numbers, columns a multiple of 32."""
        *rows, columns = shape
        if columns % BLOCK:
            raise ValueError(f"MXFP4 packs blocks of {BLOCK}, but the rows have {columns} columns")
        scales = torch.zeros(*rows, columns // BLOCK, dtype=torch.uint8)
        return cls(scales.new_zeros(*scales.shape, BLOCK // 2), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers that are packed."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    def forward(self, x: Tensor, e: int) -> Tensor:
        """``x`` by matrix ``e``: [n, columns] -> [n, rows]; differentiable by x."""
        product: Tensor = _Decoded.apply(x, self, e)  # type: ignore[no-untyped-call]
        return product

    def decode(self, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """The numbers that ``gptoss.model.mxfp4.decode`` gives; ``index``: one matrix."""
        blocks, scales = self.blocks, self.scales
        if index is not None:
            blocks, scales = blocks[index], scales[index]
        # Every value has two significant bits: bfloat16 holds it exactly wherever float32 does.
        narrow = torch.float64 if dtype is torch.float64 else torch.bfloat16
        pairs, units = _codebook(narrow, blocks.device)
        nibbles, exponents = blocks.flatten(0, -2), scales.flatten().int()  # [G, 16], [G]
        out = torch.empty(len(nibbles), BLOCK, dtype=dtype, device=blocks.device)
        step = len(nibbles) if blocks.is_cuda else IN_CACHE
        for start in range(0, len(nibbles), max(step, 1)):
            here = slice(start, start + step)
            values = pairs.index_select(0, nibbles[here].flatten().int()).view(narrow)
            torch.mul(values.view(-1, BLOCK), units[exponents[here], None], out=out[here])
        return out.view(*scales.shape[:-1], -1)


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The dtype to compute in, by its name or as it is."""
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"torch computes in {', '.join(DTYPES)}, not {name}")
    return dtype


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is float64."""
    return x if x.dtype is torch.float64 else x.float()


def expert(x: Tensor, w: Any, e: int, limit: float) -> Tensor:
    """Expert ``e`` alone: [n, D] -> [n, D]."""
    hidden = multiply(x, w.mlp1, e, w.mlp1_bias[e])  # [n, 2F]
    return multiply(swiglu(hidden, limit), w.mlp2, e, w.mlp2_bias[e])


def apart(stack: Any) -> Any:
    """The matrices of a stack; of tensors all at once, for a slice's gradient is a whole stack."""
    return stack.unbind() if hasattr(stack, "unbind") else stack


def multiply(x: Tensor, stack: Any, e: int, bias: Tensor | None = None) -> Tensor:
    """``x`` by matrix ``e`` of a stack: of tensors, packed, or whatever answers (x, e)."""
    if isinstance(stack, Tensor | tuple):
        return F.linear(x, stack[e].to(x.dtype), bias)
    product: Tensor = stack(x, e)
    return product if bias is None else product + bias.to(product.dtype)


class _Decoded(torch.autograd.Function):
    """x @ W.T, with a packed W that is decoded again on the way back and so is never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: PackedTensor, e: int) -> Tensor:
        ctx.stack, ctx.e, ctx.dtype = stack, e, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return F.linear(x, stack.decode(x.dtype, e))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        decoded = ctx.stack.decode(gradient.dtype, ctx.e)
        return (gradient @ decoded).to(ctx.dtype), None, None


def swiglu(x: Tensor, limit: float) -> Tensor:
    """See ``gptoss.model.reference.swiglu``: [..., 2F] -> [..., F]."""
    gate, up = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1.0)


def from_numpy(x: Any, device: torch.device | str = "cpu") -> Tensor:
    """A tensor with the numbers of a NumPy array, bfloat16 included; shares its memory if it can.

    The array may be read-only (a mapped file): nothing in this room writes into weights.
    """
    if x.dtype.name == "bfloat16":
        return from_numpy(x.view(np.uint16), device).view(torch.bfloat16)
    if not x.flags.writeable:  # torch would warn; a borrowed pointer does not ask
        x = np.asarray(_Borrowed(x)) if x.size else x.copy()
    return torch.from_numpy(x).to(device)


class _Borrowed:
    """An array's memory without its read-only flag."""

    def __init__(self, x: Any) -> None:
        self.owner = x  # keeps the memory alive for as long as the view
        self.__array_interface__ = {**x.__array_interface__, "data": (x.ctypes.data, False)}


@lru_cache(maxsize=8)
def rotations(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos, sin [context, 1, d/2] for every position the model has, computed once."""
    name = "float64" if dtype is torch.float64 else "float32"
    tables = rope_tables(np.arange(config.context_length), config, name)
    with torch.inference_mode(False):  # or autograd could not save them for a later training step
        cos, sin = (torch.from_numpy(table).to(device) for table in tables)
    return cos, sin


@lru_cache(maxsize=8)
def _codebook(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a byte and a scale byte mean: [256] pairs of values as one wide number, and [256].

    One lookup of a wide number is faster than one of a row of two.
    """
    double = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
    exponents = torch.arange(256, dtype=torch.float64) - BIAS
    units = torch.where(exponents == 255 - BIAS, torch.nan, exponents.exp2())
    with torch.inference_mode(False):
        pairs = torch.from_numpy(PAIRS.copy()).to(device, dtype).view(double).squeeze(-1)
        return pairs, units.to(device, dtype)
