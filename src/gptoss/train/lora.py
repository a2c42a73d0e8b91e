"""Low-rank adapters: on attention, and on routed experts that stay packed as they are.

W becomes W + scale * B @ A, where only A [r, columns] and B [rows, r] are trained. B begins as
zero, so the model begins as it was. Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptoss.backends.torch.modules import Transformer
from gptoss.backends.torch.ops import PackedTensor, apart, multiply


class LowRank(nn.Module):
    """A linear layer with an adapter: [T, columns] -> [T, rows]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        rows, columns = base.weight.shape
        self.a, self.b = _pair((), rows, columns, rank, base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        found: Tensor = self.base(x)
        return found + _small(x, self.a, self.b, self.scale).to(found.dtype)

    def merged(self) -> Tensor:
        """float32 [rows, columns]: one matrix that computes the same."""
        return self.base.weight.float() + self.scale * (self.b @ self.a)


class LowRankStack(nn.Module):
    """A stack of experts' matrices, packed or not, with an adapter for each."""

    def __init__(self, base: nn.Parameter | PackedTensor, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        experts, rows, columns = base.shape
        device = base.device if isinstance(base, Tensor) else base.blocks.device
        self.a, self.b = _pair((experts,), rows, columns, rank, device)

    def unbind(self) -> "_Opened":
        """Matrix by matrix; see ``gptoss.backends.torch.ops.apart``."""
        return _Opened(apart(self.base), self.a.unbind(), self.b.unbind(), self.scale)

    def merged(self, e: int) -> Tensor:
        """float32 [rows, columns]: expert ``e`` alone."""
        base = self.base
        whole = base.decode(torch.float32, e) if isinstance(base, PackedTensor) else base[e].float()
        return whole + self.scale * (self.b[e] @ self.a[e])


@dataclass(frozen=True, slots=True)
class _Opened:
    """A ``LowRankStack`` for one forward pass."""

    base: Any
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scale: float

    def __call__(self, x: Tensor, e: int) -> Tensor:
        found = multiply(x, self.base, e)
        return found + _small(x, self.a[e], self.b[e], self.scale).to(found.dtype)


def adapt(model: Transformer, rank: int, alpha: float) -> None:
    """Freeze ``model`` and give its attention and its experts adapters, scaled by alpha / rank."""
    model.requires_grad_(False)
    blocks: Any = model.block
    for block in blocks:
        attn, experts = block.attn, block.mlp.experts
        attn.qkv = LowRank(attn.qkv, rank, alpha / rank)
        attn.out = LowRank(attn.out, rank, alpha / rank)
        for name in ("mlp1_weight", "mlp2_weight"):
            base = getattr(experts, name)
            delattr(experts, name)
            setattr(experts, name, LowRankStack(base, rank, alpha / rank))


def _small(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return (x @ a.to(x.dtype).T) @ (scale * b.to(x.dtype)).T


def _pair(
    stack: tuple[int, ...], rows: int, columns: int, rank: int, device: torch.device
) -> tuple[nn.Parameter, nn.Parameter]:
    a = torch.randn(*stack, rank, columns, device=device) / math.sqrt(columns)
    return nn.Parameter(a), nn.Parameter(torch.zeros(*stack, rows, rank, device=device))
