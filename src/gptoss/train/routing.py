"""What the routers do: who is busy, who is idle, and a loss that evens it out."""

import torch
from torch import Tensor


class Routing:
    """A trace that keeps each router's scores and choices.

    A layer that is recomputed says everything twice; the first time counts.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        """See ``model/model.py``'s trace."""
        if name.endswith((".mlp.gate", ".mlp.chosen")):
            self.seen.setdefault(name, x)

    def loads(self) -> list[tuple[Tensor, Tensor]]:
        """By layer: scores [T, E], and each expert's share of the visits [E]."""
        found = []
        for name, scores in self.seen.items():
            if name.endswith(".gate"):
                chosen = self.seen[name.removesuffix("gate") + "chosen"].flatten()
                found.append((scores, chosen.bincount(minlength=scores.shape[-1]) / len(chosen)))
        return found

    def uneven(self) -> Tensor:
        """Load-balancing loss, the mean over layers: 1 where all experts are equally busy.

        Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equation 4.
        """
        each = [
            len(load) * (load * scores.float().softmax(-1).mean(0)).sum()
            for scores, load in self.loads()
        ]
        return torch.stack(each).mean()

    def statistics(self) -> dict[str, float]:
        """``busiest``: the busiest expert's visits over an even share, mean over layers; ``idle``:
        the share of experts that nobody visited; ``uneven``: the loss.
        """
        loads = [load for _, load in self.loads()]
        if not loads:
            return {}
        return {
            "busiest": sum(float(load.max()) * len(load) for load in loads) / len(loads),
            "idle": sum(float((load == 0).float().mean()) for load in loads) / len(loads),
            "uneven": float(self.uneven().detach()),
        }
