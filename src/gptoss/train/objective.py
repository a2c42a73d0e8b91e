"""What reinforcement learning is told: how answers are drawn, and what is made of their rewards.

Nothing here needs torch, so that the command line can be read without it.
"""

from dataclasses import dataclass

from gptoss.train.config import check, said


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """How answers are drawn: at temperature 1 from all of the model's words, so that the trainer
    scores them by the very distribution they came from.
    """

    prompts: int = said(8, "prompts of a round", 1)
    group: int = said(16, "answers to each prompt", 1, 128)
    max_tokens: int = said(256, "most tokens of an answer", 1)
    rows: int = said(128, "most answers that are drawn together", 1)
    tokens: int = said(4096, "most tokens of a batch, where an answer alone has not more", 2)
    minibatches: int = said(1, "parts of a round, an update for each", 1)
    epochs: int = said(1, "how often a round's answers are learned from", 1)
    truncated: float = said(0.0, "reward of an answer that was cut off; no function is asked", -1e9)
    skip_truncated: bool = said(False, "learn nothing from answers that were cut off")
    gap: float | None = said(
        None, "most nats a token by which sampler and trainer may differ (1e-4; bfloat16: 0.05)", 0
    )
    batch_invariant: bool = said(
        False, "both compute by the compiled core, and not one bit differs (float32, CPU)"
    )
    replay_routing: bool = said(
        False, "in training a token visits the experts that it visited when it was drawn"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """Shao et al. 2024, https://arxiv.org/abs/2402.03300, with what DAPO added (Yu et al. 2025,
    https://arxiv.org/abs/2503.14476): a higher upper clip, every token counts the same, groups
    without signal are left out and, with ``attempts``, drawn again.
    """

    clip_low: float = said(0.2, "a ratio below 1 minus this gives no gradient where it should rise")
    clip_high: float = said(0.28, "a ratio above 1 plus this gives none where it should fall")
    unscaled: bool = said(False, "do not divide advantages by the deviation of their group")
    kl: float = said(0.0, "weight of the divergence from the model that training began with")
    attempts: int = said(1, "how often prompts are drawn to find enough groups with a signal", 1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Ppo:
    """Schulman et al. 2017, https://arxiv.org/abs/1707.06347; KL control as Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593. ``lam`` is 1, as a reward that comes with an answer's end is
    worth only ``lam ** n`` to a choice n tokens before it: of 60, 0.95 leaves a twentieth, which is
    less than the mean over all tokens, so that whatever begins a long answer is punished, right or
    wrong (Yuan et al. 2025, https://arxiv.org/abs/2503.01491, saw that too).
    """

    clip_low: float = said(0.2, "a ratio below 1 minus this gives no gradient where it should rise")
    clip_high: float = said(0.2, "a ratio above 1 plus this gives none where it should fall")
    gamma: float = said(1.0, "what a reward a token later is worth", 0.0, 1.0)
    lam: float = said(1.0, "GAE: 0 trusts the value head, 1 what really came", 0.0, 1.0)
    kl: float = said(0.0, "reward lost per nat of divergence from the first model")
    kl_target: float | None = said(None, "nats per answer that the weight is steered to", 0)

    def __post_init__(self) -> None:
        check(self)
