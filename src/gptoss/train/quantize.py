"""Training for MXFP4: forward sees what export will write, the gradient passes straight on.

Bengio et al. 2013, https://arxiv.org/abs/1308.3432 (the straight-through estimator)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.backends.torch.modules import Transformer
from gptoss.model.mxfp4 import BIAS, BLOCK, CODES, MIDPOINTS, RULES, Rule


class QuantizedStack(nn.Module):
    """Experts' matrices [E, rows, columns] that compute as if they were packed."""

    def __init__(self, weight: nn.Parameter, rule: Rule) -> None:
        super().__init__()
        self.weight, self.rule = weight, rule
        self.kept: dict[int, Tensor] | None = None  # expert -> what ``unchanging`` keeps

    def unbind(self) -> "_Opened":
        """Matrix by matrix; see ``gptoss.backends.torch.ops.apart``."""
        return _Opened(self.weight.unbind(), self.rule, self.kept)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A ``QuantizedStack`` for one forward pass: only what is routed to is rounded."""

    weight: tuple[Tensor, ...]
    rule: Rule
    kept: dict[int, Tensor] | None

    def __call__(self, x: Tensor, e: int) -> Tensor:
        if self.kept is None:
            straight: Tensor = _Straight.apply(self.weight[e], self.rule)  # type: ignore[no-untyped-call]
            return F.linear(x, straight.to(x.dtype))
        if e not in self.kept:
            self.kept[e] = rounded(self.weight[e], self.rule).bfloat16()  # holds these numbers
        return F.linear(x, self.kept[e].to(x.dtype))


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rule: Rule) -> Tensor:
        return rounded(weight, rule)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def quantize(model: Transformer, rule: Rule) -> None:
    """Make the experts of ``model`` compute as if they were packed by ``rule``."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    blocks: Any = model.block
    for block in blocks:
        for name in ("mlp1_weight", "mlp2_weight"):
            weight = getattr(block.mlp.experts, name)
            delattr(block.mlp.experts, name)
            setattr(block.mlp.experts, name, QuantizedStack(weight, rule))


@contextmanager
def unchanging(model: nn.Module) -> Iterator[None]:
    """Within, nothing is learned: what is routed to is rounded once, not at every token drawn."""
    stacks = [module for module in model.modules() if isinstance(module, QuantizedStack)]
    for stack in stacks:
        stack.kept = {}
    try:
        yield
    finally:
        for stack in stacks:
            stack.kept = None


@torch.no_grad()
def rounded(weight: Tensor, rule: Rule) -> Tensor:
    """The numbers that packing ``weight`` [..., columns] would keep; see ``mxfp4.encode``."""
    groups = weight.float().reshape(-1, BLOCK)
    peak = groups.abs().amax(-1, keepdim=True)
    floor = torch.frexp(peak).exponent - 3
    ceil = floor + (torch.ldexp(peak, -floor) > 6.0).int()
    best, least = torch.zeros_like(groups), torch.full_like(peak.double(), torch.inf)
    for exponent in {"floor": [floor], "ceil": [ceil]}.get(rule, [ceil, floor, floor - 1]):
        unit = torch.exp2(exponent.clamp(-BIAS, BIAS).where(peak > 0, 0).float())
        trial = _nearest(groups / unit) * unit
        error = (trial.double() - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, trial, best), torch.minimum(error, least)
    return best.view(weight.shape).to(weight.dtype)


def _nearest(x: Tensor) -> Tensor:
    """The nearest number of four bits; of two equally near, the one with an even mantissa."""
    middle = torch.from_numpy(MIDPOINTS.copy()).to(x.device)
    values = torch.from_numpy(CODES[:8].copy()).to(x.device)
    size = x.abs()
    below = torch.bucketize(size, middle)
    tie = (size == middle[below.clamp(max=6)]) & (below % 2 == 1)
    return torch.copysign(values[below + tie], x)
