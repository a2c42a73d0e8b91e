"""GRPO: an answer is as good as it is better than the other answers to the same prompt.

    grpo("nano", ["prompts.jsonl"], "runs/first", ["exact"], config=TrainConfig(steps=50, lr=1e-4))

Goes on where an earlier call with the same arguments was interrupted.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss.train.config import TrainConfig, Tuning
from gptoss.train.objective import Grpo, Rollouts
from gptoss.train.observe import Observe
from gptoss.train.policy import Minibatch, clipped, divergence, ratios
from gptoss.train.recipes import Announce
from gptoss.train.reinforce import from_checkpoint
from gptoss.train.reward import Reward
from gptoss.train.rollout import Answer
from gptoss.train.rounds import Step
from gptoss.train.trainer import Row, Trainer

FLAT = 1e-6  # rewards of a group that differ by less tell nothing


def grpo(
    model: Path | str,
    data: Sequence[Path | str],
    path: Path | str,
    rewards: Sequence[str | Reward],
    *,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    rollouts: Rollouts = Rollouts(),  # noqa: B008
    objective: Grpo = Grpo(),  # noqa: B008
    tuning: Tuning = Tuning(),  # noqa: B008
    watch: Callable[[Row], None] | None = None,
    looked: Callable[[int, int], None] | None = None,
    observe: Observe | None = None,
    announce: Announce | None = None,
) -> Trainer[Minibatch]:
    """Train a checkpoint on what functions say of its answers.

    Args:
        model: "nano", a checkpoint's path, or a Hugging Face id.
        data: files of JSON lines: conversations up to the model's turn; see ``rollout.prompt``.
        path: the run's directory.
        rewards: functions, or how they are told; see ``reward.py``.
        config, rollouts, objective, tuning: how to train, how to draw answers, what to make of
            their rewards, and what of the model is trained.
        watch, looked, observe, announce: as of ``sft``.

    Raises:
        TrainingError: a line is no prompt, a reward raised, the directory is taken.
        CheckpointError: the model cannot be read, or a checkpoint cannot be written.
    """
    recipe = GroupRelative(objective, rollouts.group)
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


class GroupRelative:
    """The ``Recipe``. ``group``: answers to each prompt."""

    name, values = "grpo", False

    def __init__(self, objective: Grpo, group: int) -> None:
        self.objective, self.group, self.attempts = objective, group, objective.attempts

    def useful(self, group: Sequence[Answer]) -> bool:
        """See ``Recipe.useful``: not where all are equally good."""
        rewards = [answer.reward for answer in group]
        return max(rewards) - min(rewards) > FLAT

    def advise(
        self, answers: list[Answer], steps: list[Step], memory: dict[str, Any]
    ) -> dict[str, float]:
        """See ``Recipe.advise``: every token of an answer has the answer's advantage."""
        rewards = torch.tensor([answer.reward for answer in answers]).view(-1, self.group)
        better = advantages(rewards, self.objective.unscaled).flatten()
        for step in steps:
            for m in step:
                counts = torch.tensor([len(answers[row].tokens) for row in m.rows])
                m.known["advantage"] = better[m.rows].repeat_interleave(counts)
        return {}

    def losses(self, now: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Recipe.losses``."""
        o = self.objective
        bounds = (now, known["old"], known["advantage"], o.clip_low, o.clip_high)
        losses, said = clipped(*bounds), ratios(*bounds)
        if "reference" in known:
            said["kl"] = divergence(now, known["reference"])
            losses = losses + o.kl * said["kl"]
        return losses, said


def advantages(rewards: Tensor, unscaled: bool = False) -> Tensor:
    """How much better each answer is than its group: [groups, n] -> [groups, n].

    Divided by the group's deviation, unless ``unscaled``. All zero where all are alike.
    """
    better = rewards - rewards.mean(dim=1, keepdim=True)
    flat = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True) < FLAT
    if not unscaled:
        better = better / rewards.std(dim=1, correction=0, keepdim=True).clamp(min=FLAT)
    return better.masked_fill(flat, 0.0)
