"""A model that answers, as the trainer sees it, and what both recipes make of its ratios."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from gptoss.backends.torch.modules import Transformer
from gptoss.model.model import no_trace
from gptoss.train.batch import Batch
from gptoss.train.config import TrainConfig
from gptoss.train.loss import layer_of, logprobs
from gptoss.train.replay import replaying
from gptoss.train.routing import Routing


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Answers that are computed together, and what is known of each of their W tokens."""

    batch: Batch | None  # None: the round gave nothing to learn from
    rows: list[int]  # which of the round's answers
    known: dict[str, Tensor]  # [W] each: sampled, old, advantage; reference, value, target
    metrics: dict[str, float]  # of the round, told once
    chosen: Tensor | None = None  # int16 [T, L, k]: the experts each token visited when drawn

    @property
    def origin(self) -> str:
        """For messages."""
        return self.batch.origin if self.batch else "no prompt"

    def packed(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        batch = self.batch and {f.name: getattr(self.batch, f.name) for f in fields(Batch)}
        return {f.name: getattr(self, f.name) for f in fields(Minibatch)} | {"batch": batch}

    @classmethod
    def of(cls, packed: dict[str, Any]) -> "Minibatch":
        """The other way around."""
        batch = packed["batch"]
        return cls(**{**packed, "batch": batch and Batch(**batch)})


class ValueHead(nn.Module):
    """What is still to be earned after a token: the last norm's output [W, D] -> float32 [W]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """In float32, whatever x is."""
        return x.float() @ self.weight.float() + self.bias.float()


class Policy:
    """A model that answers, as the trainer sees it.

    Args:
        model: what is trained; with ``value``, a ``ValueHead`` becomes a part of it.
        words: how many of its words can be drawn. The others have no probability.
        config: how it is computed.
        logprobs: ``loss.logprobs``, or what stands in for it.
    """

    def __init__(
        self,
        model: Transformer,
        words: int,
        config: TrainConfig,
        *,
        value: bool = False,
        logprobs: Callable[[Tensor, Tensor, Tensor], Tensor] = logprobs,
    ) -> None:
        self.model, self.words, self.config, self.logprobs = model, words, config, logprobs
        table = model.embedding.weight
        self.device = table.device
        self.narrow = config.autocast or table.dtype is torch.bfloat16
        self.head: ValueHead | None = None
        if value:
            self.head = ValueHead(model.config.hidden_size).to(self.device)
            model.add_module("value", self.head)

    def score(
        self,
        batch: Batch,
        routing: Routing | None = None,
        chosen: Tensor | None = None,
        *,
        model: Transformer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """float32 [W]: the log-probability of each of ``batch.targets``; and what its token's value
        is, [W], where there is a head. ``routing`` is told what routers do; ``chosen``, int
        [T, L, k], is what they are to do (and to tell). ``model``: another's opinion."""
        model, layer = model or self.model, layer_of(self.config)
        if chosen is not None:
            assert routing is not None
            layer = replaying(layer, chosen.to(self.device))
        table, values = model.unembedding.weight[: self.words], []

        def head(x: Tensor) -> Tensor:
            if self.head is not None:
                values.append(self.head(x))
            return self.logprobs(x, table, batch.targets)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            found: Tensor = model(
                batch.tokens,
                lengths=batch.lengths,
                wanted=batch.wanted,
                head=head,
                layer=layer,
                trace=routing or no_trace,
            )
        return found, values[0] if values else None


def clipped(now: Tensor, old: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """The clipped surrogate's loss of each token, all [W]: Schulman et al. 2017, equation 7.

    ``now``, ``old``: log-probabilities; the ratio is held to 1 - low and 1 + high.
    """
    ratio = (now - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def divergence(now: Tensor, reference: Tensor) -> Tensor:
    """KL from the reference, estimated from each drawn token alone: unbiased and never negative.

    Schulman 2020, http://joschu.net/blog/kl-approx.html, k3.
    """
    log_ratio = reference - now
    return log_ratio.exp() - 1 - log_ratio


def ratios(
    now: Tensor, old: Tensor, advantage: Tensor, low: float, high: float
) -> dict[str, Tensor]:
    """What is said of each token: how far its ratio is from 1, whether it was clipped, and its
    surprise, whose mean is the policy's entropy."""
    ratio = (now - old).exp()
    over = torch.where(advantage > 0, ratio > 1 + high, ratio < 1 - low)
    return {"ratio": (ratio - 1).abs(), "clipped": over.float(), "entropy": -now}
