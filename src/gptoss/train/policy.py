"""A model that answers, as the trainer sees it, and what both recipes make of its ratios."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

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
    known: dict[str, Tensor]  # [W] each: sampled, old, advantage; reference, states [W, D]
    metrics: dict[str, float]  # of the round, told once
    chosen: Tensor | None = None  # int16 [T, L, k]: the experts each token visited when drawn

    @property
    def origin(self) -> str:
        """For messages."""
        return self.batch.origin if self.batch else "no prompt"

    def part(self, index: int, count: int) -> "Minibatch":
        """See ``Batch.part``."""
        metrics = self.metrics if index == 0 else {}
        if self.batch is None:
            return replace(self, metrics=metrics)
        start, stop = self.batch.span(index, count)
        said = (self.batch.wanted >= start) & (self.batch.wanted < stop)
        known = {name: x[said] for name, x in self.known.items()}
        chosen = None if self.chosen is None else self.chosen[start : max(stop, 1)]
        batch = self.batch.part(index, count)
        return replace(self, batch=batch, known=known, metrics=metrics, chosen=chosen)

    def packed(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        batch = self.batch and {f.name: getattr(self.batch, f.name) for f in fields(Batch)}
        return {f.name: getattr(self, f.name) for f in fields(Minibatch)} | {"batch": batch}

    @classmethod
    def of(cls, packed: dict[str, Any]) -> "Minibatch":
        """The other way around."""
        batch = packed["batch"]
        return cls(**{**packed, "batch": batch and Batch(**batch)})


class Policy:
    """A model that answers, as the trainer sees it.

    Args:
        model: what is trained.
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
        logprobs: Callable[[Tensor, Tensor, Tensor], Tensor] = logprobs,
    ) -> None:
        self.model, self.words, self.config, self.logprobs = model, words, config, logprobs
        table = model.embedding.weight
        self.device = table.device
        self.narrow = config.autocast or table.dtype is torch.bfloat16

    def score(
        self,
        batch: Batch,
        routing: Routing | None = None,
        chosen: Tensor | None = None,
        *,
        model: Transformer | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """float32 [W]: the log-probability of each of ``batch.targets``.

        ``routing`` is told what routers do; ``chosen``, int [T, L, k], is what they are to do (and
        to tell). ``model``: another's opinion. ``states`` gets the last norm's output, [W, D].
        """
        used, layer = model or self.model, layer_of(self.config)
        if chosen is not None:
            assert routing is not None
            layer = replaying(layer, chosen.to(self.device))

        def head(x: Tensor) -> Tensor:
            if states is not None:
                states.append(x)
            return self.logprobs(x, used.unembedding.weight[: self.words], batch.targets)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            found: Tensor = used(
                batch.tokens,
                lengths=batch.lengths,
                wanted=batch.wanted,
                head=head,
                layer=layer,
                trace=routing or no_trace,
            )
        return found


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
