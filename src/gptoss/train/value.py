"""PPO's value head: a line through the last norm's output, and least squares to draw it.

What is to be learned is linear, so its best answer is solved for. A few answers tell something of
what the next ones will earn, where a head that went down gradients at the policy's rate was no
wiser than the mean after 24 rounds; and it disturbs neither the policy's weights nor the length of
its gradients. A round's states are in memory together until it has learned.

Least-squares temporal differences: Bradtke and Barto 1996; with an eligibility of ``lam``, Boyan
2002.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEPT = 0.8  # what a round still counts one round later: the policy that it saw has moved on
RIDGE = 0.1  # how strongly weights are held to zero, as a share of their mean square input


@dataclass(frozen=True, slots=True)
class ValueHead:
    """What is still to be earned when a token is to be said: [W, D] -> [W]."""

    squares: Tensor  # float64 [D + 1, D + 1]; the last row and column are the bias's
    products: Tensor  # float64 [D + 1]
    weight: Tensor  # float64 [D + 1]: what solves them

    @classmethod
    def new(cls, hidden_size: int) -> "ValueHead":
        """Nothing is to be earned."""
        n = hidden_size + 1
        zeros = torch.zeros(n, dtype=torch.float64)
        return cls(torch.zeros(n, n, dtype=torch.float64), zeros, zeros)

    def __call__(self, x: Tensor) -> Tensor:
        """The last norm's outputs [W, D] -> float32 [W]."""
        weight = self.weight.float()
        return x.float() @ weight[:-1] + weight[-1]

    def after(self, x: Tensor, targets: Tensor) -> "ValueHead":
        """The head that has also seen a round: its outputs [W, D], and what was earned [W]."""
        wide = torch.cat([x.float(), torch.ones(len(x), 1)], dim=1)
        squares = KEPT * self.squares + (wide.T @ wide).double()
        products = KEPT * self.products + (wide.T @ targets.float()).double()
        held = squares.diagonal().clone()
        held[:] = RIDGE * held[:-1].mean()
        held[-1] = 0.0  # the bias may be what it likes
        return ValueHead(squares, products, torch.linalg.solve(squares + held.diag(), products))

    def packed(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {name: getattr(self, name) for name in self.__slots__}
