"""PPO: a value head says how good an answer will be, and a token is as good as it betters that.

    ppo("nano", ["prompts.jsonl"], "runs/first", ["exact"], config=TrainConfig(steps=50, lr=1e-4))

Goes on where an earlier call with the same arguments was interrupted.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss.train.config import TrainConfig, Tuning
from gptoss.train.objective import Ppo, Rollouts
from gptoss.train.observe import Observe
from gptoss.train.policy import Minibatch, clipped, divergence, ratios
from gptoss.train.recipes import Announce
from gptoss.train.reinforce import from_checkpoint
from gptoss.train.reward import Reward
from gptoss.train.rollout import Answer
from gptoss.train.rounds import Step
from gptoss.train.trainer import Row, Trainer
from gptoss.train.value import ValueHead

FLAT = 1e-6  # a deviation, or a variance, that is only rounding


def ppo(
    model: Path | str,
    data: Sequence[Path | str],
    path: Path | str,
    rewards: Sequence[str | Reward],
    *,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    rollouts: Rollouts = Rollouts(),  # noqa: B008
    objective: Ppo = Ppo(),  # noqa: B008
    tuning: Tuning = Tuning(),  # noqa: B008
    watch: Callable[[Row], None] | None = None,
    looked: Callable[[int, int], None] | None = None,
    observe: Observe | None = None,
    announce: Announce | None = None,
) -> Trainer[Minibatch]:
    """As ``grpo``; the value head is kept with the run and is no part of what is exported."""
    recipe = Proximal(objective)
    return from_checkpoint(
        *(model, data, path, rewards, recipe),
        config=config,
        rollouts=rollouts,
        tuning=tuning,
        watch=watch,
        looked=looked,
        observe=observe,
        announce=announce,
    )


class Proximal:
    """The ``Recipe``."""

    name, values, attempts = "ppo", True, 1

    def __init__(self, objective: Ppo) -> None:
        self.objective = objective

    def useful(self, group: Sequence[Answer]) -> bool:
        """See ``Recipe.useful``: every answer is, for it is held against its value."""
        return True

    def advise(
        self, answers: list[Answer], steps: list[Step], memory: dict[str, Any]
    ) -> dict[str, float]:
        """See ``Recipe.advise``: advantages by GAE, less their mean.

        They are divided by the largest deviation that a round has had, not by this round's: where
        nearly all answers are as good, what is left of it is noise, and would count as much as
        the signal did before.
        """
        o, all_of = self.objective, [m for step in steps for m in step]
        told = [answers[row] for m in all_of for row in m.rows]
        weight, kl = memory.setdefault("kl_weight", o.kl), "reference" in all_of[0].known
        apart = of(all_of, "old") - of(all_of, "reference" if kl else "old")
        states = torch.cat([m.known.pop("states") for m in all_of])
        better, metrics = self._better(told, -weight * apart, states, memory)
        memory["scale"] = max(memory.get("scale", FLAT), metrics["deviation"])
        even = (better - better.mean()) / memory["scale"]
        sizes = [len(m.known["old"]) for m in all_of]
        for m, advantage in zip(all_of, torch.split(even, sizes), strict=True):
            m.known["advantage"] = advantage
        if kl:
            metrics |= {"kl_answer": float(apart.sum()) / len(told), "kl_weight": weight}
            if o.kl_target is not None:
                memory["kl_weight"] = steered(weight, metrics["kl_answer"], o.kl_target)
        return metrics

    def _better(
        self, told: list[Answer], earned: Tensor, states: Tensor, memory: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        """How much better each token is than its value, all [W]; the head learns from it.

        ``earned``: what tokens cost; answers' rewards are added at their ends.
        """
        lengths = [len(answer.tokens) for answer in told]
        earned[torch.tensor(lengths).cumsum(0) - 1] += torch.tensor([a.reward for a in told])
        head = ValueHead(**memory["head"]) if "head" in memory else ValueHead.new(states.shape[1])
        value = head(states)
        each = zip(*(torch.split(x, lengths) for x in (earned, value)), strict=True)
        better = torch.cat([gae(r, v, self.objective.gamma, self.objective.lam) for r, v in each])
        target = better + value
        memory["head"] = head.after(states, target).packed()
        deviation = float(better.std(correction=0))
        return better, {"explained": explained(value, target), "deviation": deviation}

    def losses(self, now: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Recipe.losses``."""
        o = self.objective
        bounds = (now, known["old"], known["advantage"], o.clip_low, o.clip_high)
        said = ratios(*bounds)
        if "reference" in known:
            said["kl"] = divergence(now, known["reference"])
        return clipped(*bounds), said


def of(minibatches: Sequence[Minibatch], name: str) -> Tensor:
    """What is known of all of their tokens."""
    return torch.cat([m.known[name] for m in minibatches])


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates of one answer, all [n]; nothing is earned after its end.

    Schulman et al. 2015, https://arxiv.org/abs/1506.02438, equation 16.
    """
    later, ahead, found = 0.0, 0.0, []
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        later = reward + gamma * ahead - value + gamma * lam * later
        ahead = value
        found.append(later)
    return torch.tensor(found[::-1], dtype=values.dtype)


def steered(weight: float, kl: float, target: float) -> float:
    """The KL weight of the next round: Ziegler et al. 2019, section 2.2."""
    return weight * (1.0 + 0.1 * max(-0.2, min(0.2, kl / target - 1.0)))


def explained(value: Tensor, target: Tensor) -> float:
    """Share of what varies in the targets that the values knew before; 0 if nothing does."""
    varies = float(target.var(correction=0))
    left = float((target - value).var(correction=0))
    return 1.0 - left / varies if varies > FLAT else 0.0
