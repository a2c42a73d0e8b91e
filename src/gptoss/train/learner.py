"""What ``Trainer`` trains: parameters, their gradients, and what turns these into updates.

``Learner`` says what is asked of them; ``Torch`` is a torch module's. MLX's: ``train/mlx.py``.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from gptoss.train.config import TrainConfig
from gptoss.train.folder import restore
from gptoss.train.optimize import optimizers


class Learner(Protocol):
    """Parameters and gradients of any library."""

    def begin(self) -> None:
        """Another step: forget the gradients of the last one."""

    def learn(self, batch: Any, loss: Any) -> tuple[float, dict[str, float]]:
        """Add a batch's gradients to the step's -> its loss and what it reports."""

    def clip(self, longest: float) -> float:
        """Shorten the step's gradient to ``longest`` at most -> its length before."""

    def update(self, share: float) -> None:
        """Change the parameters, at this share of the peak rate."""

    def trained(self) -> dict[str, Tensor]:
        """What training changes, by name."""

    def optimized(self) -> list[Any]:
        """What the optimisers must remember, as ``torch.save`` writes it."""

    def restore(self, trained: dict[str, Tensor], optimized: list[Any]) -> None:
        """Be as when these two were asked for."""


class Torch:
    """A module's parameters that want a gradient. ``loss`` gives a tensor and its metrics."""

    layer: Callable[..., Any] | None = None  # what computes a layer, if not the config says it

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model, self.optimizers = model, optimizers(model, config)

    def begin(self) -> None:
        """See ``Learner.begin``."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def learn(self, batch: Any, loss: Any) -> tuple[float, dict[str, float]]:
        """See ``Learner.learn``."""
        value, metrics = loss(batch)
        value.backward()
        return value.item(), metrics

    def clip(self, longest: float) -> float:
        """See ``Learner.clip``."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), longest).item()

    def update(self, share: float) -> None:
        """See ``Learner.update``."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()

    def trained(self) -> dict[str, Tensor]:
        """See ``Learner.trained``."""
        return trained(self.model)

    def optimized(self) -> list[Any]:
        """See ``Learner.optimized``."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def restore(self, trained: dict[str, Tensor], optimized: list[Any]) -> None:
        """See ``Learner.restore``."""
        restore(self.model, trained)
        for optimizer, its in zip(self.optimizers, optimized, strict=True):
            optimizer.load_state_dict(its)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a module, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
