"""What the routers do: who is busy, who is idle, and a loss that evens it out."""

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor


class Routing:
    """A trace that keeps each router's scores and choices.

    A layer that is recomputed says everything twice; the first time counts.

    Args:
        parts: of the batch, that as many processes compute. What experts have to do is counted over
            all of them; scores are those of this part.
        hollow: this part is of nobody's tokens.
    """

    def __init__(self, parts: int = 1, hollow: bool = False) -> None:
        self.parts, self.hollow = parts, hollow
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        """See ``model/model.py``'s trace."""
        if name.endswith((".mlp.gate", ".mlp.chosen")):
            self.seen.setdefault(name, x)

    @cached_property
    def loads(self) -> list[tuple[Tensor, Tensor]]:
        """By layer: scores [T, E], and each expert's share of the visits [E]."""
        names = [name.removesuffix("gate") for name in self.seen if name.endswith(".gate")]
        if not names:
            return []
        scores = [self.seen[f"{name}gate"] for name in names]
        visits = [self.seen[f"{name}chosen"].flatten() for name in names]
        counts = torch.stack(
            [v.bincount(minlength=s.shape[-1]) for s, v in zip(scores, visits, strict=True)]
        )
        if self.parts > 1:
            counts *= not self.hollow
            dist.all_reduce(counts)
        return list(zip(scores, counts / counts.sum(dim=-1, keepdim=True), strict=True))

    def uneven(self) -> Tensor:
        """Load-balancing loss, the mean over layers: 1 where all experts are equally busy.

        Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equation 4.
        """
        each = [
            len(load) * (load * scores.float().softmax(-1).mean(0)).sum()
            for scores, load in self.loads
        ]
        return torch.stack(each).mean()

    def statistics(self) -> dict[str, float]:
        """``busiest``: the busiest expert's visits over an even share, mean over layers; ``idle``:
        the share of experts that nobody visited; ``uneven``: the loss.
        """
        loads = [load for _, load in self.loads]
        if not loads:
            return {}
        return {
            "busiest": sum(float(load.max()) * len(load) for load in loads) / len(loads),
            "idle": sum(float((load == 0).float().mean()) for load in loads) / len(loads),
            "uneven": float(self.uneven().detach()),
        }
