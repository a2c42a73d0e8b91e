"""PPO: a value head says how good an answer will be, and a token is as good as it betters that.

    ppo("nano", ["prompts.jsonl"], "runs/first", ["exact"], config=TrainConfig(steps=50, lr=1e-4))

Goes on where an earlier call with the same arguments was interrupted.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

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
    """As ``grpo``; the value head is saved with the run and is no part of what is exported."""
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
        self, answers: list[Answer], steps: list[Step], memory: dict[str, float]
    ) -> dict[str, float]:
        """See ``Recipe.advise``: advantages by GAE, then made even over the round."""
        o, all_of = self.objective, [m for step in steps for m in step]
        weight = memory.setdefault("kl_weight", o.kl)
        for m in all_of:
            counts = [len(answers[row].tokens) for row in m.rows]
            earned = torch.zeros_like(m.known["old"])
            if "reference" in m.known:
                earned -= weight * (m.known["old"] - m.known["reference"])
            ends = torch.tensor(counts).cumsum(0) - 1
            earned[ends] += torch.tensor([answers[row].reward for row in m.rows])
            each = zip(*(torch.split(x, counts) for x in (earned, m.known["value"])), strict=True)
            m.known["advantage"] = torch.cat([gae(r, v, o.gamma, o.lam) for r, v in each])
            m.known["target"] = m.known["advantage"] + m.known["value"]
        every = torch.cat([m.known["advantage"] for m in all_of])
        for m in all_of:
            m.known["advantage"] = (m.known["advantage"] - every.mean()) / (every.std() + 1e-8)
        metrics = {"explained": explained(all_of)}
        if "reference" in all_of[0].known:
            apart = sum(float((m.known["old"] - m.known["reference"]).sum()) for m in all_of)
            metrics |= {"kl_answer": apart / sum(len(m.rows) for m in all_of), "kl_weight": weight}
            if o.kl_target is not None:
                memory["kl_weight"] = steered(weight, metrics["kl_answer"], o.kl_target)
        return metrics

    def losses(
        self, now: Tensor, value: Tensor | None, known: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Recipe.losses``."""
        assert value is not None
        o = self.objective
        bounds = (now, known["old"], known["advantage"], o.clip_low, o.clip_high)
        wrong = value_losses(value, known["value"], known["target"], o.value_clip)
        said = ratios(*bounds) | {"value_loss": wrong}
        if "reference" in known:
            said["kl"] = divergence(now, known["reference"])
        return clipped(*bounds) + o.value * wrong, said


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


def value_losses(value: Tensor, before: Tensor, target: Tensor, clip: float) -> Tensor:
    """Half the squared error of each value, or of what clipping its move leaves, if that is more.

    All [W]; ``before``: what the values were when the round was scored.
    """
    held = before + (value - before).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - target) ** 2, (held - target) ** 2)


def steered(weight: float, kl: float, target: float) -> float:
    """The KL weight of the next round: Ziegler et al. 2019, section 2.2."""
    return weight * (1.0 + 0.1 * max(-0.2, min(0.2, kl / target - 1.0)))


def explained(minibatches: Sequence[Minibatch]) -> float:
    """Share of what varies in the targets that the values knew before."""
    target, value = (torch.cat([m.known[k] for m in minibatches]) for k in ("target", "value"))
    return float(1.0 - (target - value).var() / target.var().clamp(min=1e-8))
