"""What GRPO and PPO begin with: the model, its prompts, its rewards, and the trainer of them."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gptoss.backends import has_native
from gptoss.backends.torch.modules import Transformer
from gptoss.errors import BackendUnavailable
from gptoss.text.tokenizer import Tokenizer
from gptoss.train.batch import Document
from gptoss.train.config import TrainConfig, Tuning
from gptoss.train.corpus import Corpus
from gptoss.train.lint import lint
from gptoss.train.loss import logprobs
from gptoss.train.objective import Rollouts
from gptoss.train.observe import Observe, observed
from gptoss.train.policy import Minibatch, Policy
from gptoss.train.ranks import ALONE, Ranks, join
from gptoss.train.recipes import Announce, build, numbers_of, planned, tokenizer_of
from gptoss.train.reward import Reward, Rewards
from gptoss.train.rollout import Sampler, prompt
from gptoss.train.rounds import Recipe, Rounds
from gptoss.train.trainer import Row, Trainer

Told = Sequence[str | Reward]


def reinforce(
    module: Transformer,
    tokenizer: Tokenizer,
    corpus: Corpus,
    path: Path | str,
    rewards: Told,
    recipe: Recipe,
    *,
    config: TrainConfig,
    rollouts: Rollouts,
    asked: dict[str, Any] | None = None,
    watch: Callable[[Row], None] | None = None,
    observe: Observe | None = None,
) -> Trainer[Minibatch]:
    """Train a module on the rewards of its own answers, to the last step.

    ``corpus``: see ``prompts_of``. ``asked``: what else a run must agree on to go on.
    """
    check(config)
    ranks, judges = join(config), Rewards(rewards)
    if not ranks.alone and (rollouts.batch_invariant or observe is not None):
        raise ValueError("trace, batch_invariant: for one process alone, not several")
    rounds = rounds_of(module, tokenizer, corpus, judges, recipe, config, rollouts, ranks)
    whole = asdict(rollouts) | asdict(recipe.objective) | {"rewards": judges.told}
    trainer: Trainer[Minibatch] = Trainer(
        module, config, path, asked=whole | (asked or {}), watch=watch, ranks=ranks
    )

    def draw(position: Any) -> Any:
        if not ranks.alone and not (position and position["pending"]):
            learner: Any = trainer.learner
            learner.collect(rounds.sampler.model)
        return rounds.draw(position)

    trainer.run(draw, observed(trainer, module, rounds.loss, observe))
    return trainer


def rounds_of(
    module: Transformer,
    tokenizer: Tokenizer,
    corpus: Corpus,
    judges: Rewards,
    recipe: Recipe,
    config: TrainConfig,
    rollouts: Rollouts,
    ranks: Ranks = ALONE,
) -> Rounds:
    """Sampler and policy over a module's own tensors, and what goes on between them.

    Of several processes, which divide the module, each draws from a whole copy.
    """
    backend, scorer = None, logprobs
    if rollouts.batch_invariant:
        if not has_native():
            raise BackendUnavailable(
                "batch_invariant needs the package's compiled core, which this installation lacks; "
                "install a wheel or build with a C++20 compiler, or leave it out"
            )
        from gptoss.train import invariant

        backend, scorer = invariant.make_invariant(module, config), invariant.logprobs
    sampler = Sampler(
        *(module if ranks.alone else deepcopy(module), tokenizer, judges, rollouts),
        autocast=config.autocast,
        backend=backend,
    )
    reference = deepcopy(module).requires_grad_(False) if recipe.objective.kl else None
    policy = Policy(module, sampler.words, config, logprobs=scorer)
    return Rounds(recipe, policy, sampler, corpus, rollouts, reference, ranks)


def from_checkpoint(
    model: Path | str,
    data: Sequence[Path | str],
    path: Path | str,
    rewards: Told,
    recipe: Recipe,
    *,
    config: TrainConfig,
    rollouts: Rollouts,
    tuning: Tuning,
    watch: Callable[[Row], None] | None,
    looked: Callable[[int, int], None] | None,
    observe: Observe | None,
    announce: Announce | None,
) -> Trainer[Minibatch]:
    """``reinforce`` by names, as ``sft`` does it."""
    check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    asked: dict[str, Any] = {"recipe": recipe.name, "model": str(model), "tokenizer": None}
    asked |= asdict(tuning)
    tokenizer = tokenizer_of(asked)
    corpus = prompts_of(data, tokenizer, numbers_of(asked).context_length, config.seed)
    held = recipe.objective.kl > 0
    plan = None
    if join(config).alone:
        plan = planned(asked, path, config, rollouts.tokens, rollouts=rollouts, reference=held)
    if not (Path(path) / "states").exists():
        lint(corpus, looked)
    if announce is not None and plan is not None:
        announce(plan)
    torch.manual_seed(config.seed)
    module = build(asked, config.device)
    asked |= {"data": [str(file) for file in data], "checksums": corpus.checksums}
    return reinforce(
        *(module, tokenizer, corpus, path, rewards, recipe),
        config=config,
        rollouts=rollouts,
        asked=asked,
        watch=watch,
        observe=observe,
    )


def check(config: TrainConfig) -> None:
    """Raises ValueError for what cannot be had while answers are drawn."""
    if config.offload == "parameters":
        raise ValueError(
            "offload: answers are drawn from all of the parameters, so these cannot be put away; "
            "the optimiser's state can (--offload optimizer)"
        )


def prompts_of(
    data: Sequence[Path | str], tokenizer: Tokenizer, room: int, seed: int = 0
) -> Corpus:
    """The files' prompts; ``room``: the model's context."""

    def render(raw: Any, origin: str) -> list[Document]:
        return [prompt(raw, tokenizer, origin, room=room)]

    return Corpus(data, render, seed)
