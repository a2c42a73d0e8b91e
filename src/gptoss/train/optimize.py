"""What turns gradients into updates: AdamW, and for matrices Muon."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gptoss.train.config import TrainConfig

OUTSIDE = ("gate.", "embedding.")  # matrices that Muon is not for; "unembedding." too


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps; for (stacks of) matrices.

    Jordan 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                gain = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * gain)


def orthogonal(g: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to [..., rows, columns], roughly."""
    x = g if g.shape[-2] <= g.shape[-1] else g.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    found: Tensor = x if g.shape[-2] <= g.shape[-1] else x.mT
    return found


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for what is trainable; with ``config.muon``, Muon for the matrices inside the blocks.

    Each group remembers the peak of its rate as ``peak``.
    """
    parts: dict[str, list[Tensor]] = {"muon": [], "matrix": [], "vector": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            flat = p.dim() < 2 or name.endswith("bias")
            inside = config.muon is not None and not any(part in name for part in OUTSIDE)
            parts["vector" if flat else "muon" if inside else "matrix"].append(p)
    if not any(parts.values()):
        raise ValueError("the model has no parameter that can be trained")
    decay = {"matrix": config.weight_decay, "vector": 0.0}
    groups = [{"params": parts[kind], "weight_decay": d} for kind, d in decay.items()]
    found: list[torch.optim.Optimizer] = []
    if groups := [group for group in groups if group["params"]]:
        betas = (config.beta1, config.beta2)
        found.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True))
    if parts["muon"]:
        assert config.muon is not None
        found.append(Muon(parts["muon"], lr=config.muon))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found
