"""Rounds: answers are drawn from the model as it is, judged, scored, and learned from.

Three log-probabilities belong to each token of an answer, and are kept apart:

* ``sampled``: what the sampler gave it when it was drawn;
* ``old``: what the trainer gave it before the round's first update, the ratio's denominator;
* what the trainer gives it now.

The last two come from the same call on the same batch, so at a round's first update every ratio is
exactly 1. The first two come from the same weights and the same ``model.py``, but from products of
other shapes, whose sums round differently: ``gap`` is their mean distance, ``gap_most`` the
largest, said of every round; a run whose first gap is too large does not begin. With
``batch_invariant`` all three are the same number, and a gap in any round ends the run. With
``replay_routing`` experts are no part of it, and ``rerouted`` is the share of choices, over tokens
and layers, that the trainer would have made otherwise.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gptoss.backends.torch.modules import Transformer
from gptoss.engine.draw import philox
from gptoss.errors import TrainingError
from gptoss.train.batch import collate
from gptoss.train.corpus import Corpus
from gptoss.train.objective import Grpo, Ppo, Rollouts
from gptoss.train.policy import Minibatch, Policy
from gptoss.train.ranks import ALONE, Ranks
from gptoss.train.replay import rerouted
from gptoss.train.rollout import Answer, Prompt, Sampler
from gptoss.train.routing import Routing

WIDE, NARROW = 1e-4, 0.05  # nats a token that a gap may be: float32, bfloat16
Step = list[Minibatch]


class Recipe(Protocol):
    """What GRPO and PPO do differently."""

    name: str
    attempts: int  # how often prompts are drawn to fill a round with useful groups
    values: bool  # whether it has a value head, which is shown ``states``

    @property
    def objective(self) -> Grpo | Ppo:
        """Its numbers."""

    def useful(self, group: Sequence[Answer]) -> bool:
        """Whether anything can be learned from the answers to one prompt."""

    def advise(
        self, answers: list[Answer], steps: list[Step], memory: dict[str, Any]
    ) -> dict[str, float]:
        """Put ``advantage`` into what is known of each minibatch; the round's metrics.

        ``memory`` goes from round to round and is kept in checkpoints. With ``values``, each
        minibatch's ``states``, the last norm's output [W, D], are to be taken out of what is known.
        """

    def losses(self, now: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Of each token [W], and what is said of each token."""


class Rounds:
    """``draw`` and ``loss`` for ``Trainer.run``.

    Args:
        policy, sampler: the same weights.
        corpus: its lines are ``Prompt``s.
        rollouts: how answers are drawn.
        reference: the model that ``reference`` log-probabilities come from, if they are needed.
        ranks: the processes that draw and score together, each its share, from the sampler's model.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        sampler: Sampler,
        corpus: Corpus,
        rollouts: Rollouts,
        reference: Transformer | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.policy, self.sampler, self.corpus = recipe, policy, sampler, corpus
        self.ranks = ranks
        self.rollouts, self.reference, self.compared = rollouts, reference, False

    def draw(self, position: dict[str, Any] | None) -> tuple[Step, dict[str, Any]]:
        """The batches of one update, and the position after it.

        A position is the round, the place among the prompts, what the recipe remembers, and the
        updates of this round that are still to come.
        """
        at = position or {"round": 0, "place": 0, "memory": {}, "pending": []}
        if not at["pending"]:
            at = self._round(at)
        now, *pending = at["pending"]
        return [Minibatch.of(packed) for packed in now], at | {"pending": pending}

    def loss(self, minibatch: Minibatch) -> tuple[Tensor, dict[str, float]]:
        """Every token counts the same, whoever's answer it is part of."""
        if minibatch.batch is None:
            return torch.zeros((), requires_grad=True), minibatch.metrics
        config, share = self.policy.config, minibatch.batch.share
        routing = Routing(minibatch.batch.parts, hollow=not share)
        batch = minibatch.batch.to(self.policy.device)
        known = {name: x.to(self.policy.device) for name, x in minibatch.known.items()}
        now = self.policy.score(batch, routing, minibatch.chosen)
        losses, said = self.recipe.losses(now, known)
        loss = (losses * batch.weights).sum()
        metrics = {name: float((x.detach() * batch.weights).sum()) for name, x in said.items()}
        metrics["tokens"] = float(len(batch.tokens)) if share else 0.0
        if config.balance:
            loss = loss + config.balance * batch.share * routing.uneven()
        return loss, metrics | minibatch.metrics

    def _round(self, at: dict[str, Any]) -> dict[str, Any]:
        answers, place, metrics = self._answers(at["round"], at["place"])
        steps, memory = self._steps(answers), dict(at["memory"])
        if steps:
            metrics |= self._gap(steps)
            metrics |= self.recipe.advise(answers, steps, memory)
        for step in steps:
            step[0].metrics.update(metrics)
        whole = [[minibatch.packed() for minibatch in step] for step in steps]
        pending = whole * self.rollouts.epochs or [[Minibatch(None, [], {}, metrics).packed()]]
        return {"round": at["round"] + 1, "place": place, "memory": memory, "pending": pending}

    def _answers(self, number: int, place: int) -> tuple[list[Answer], int, dict[str, float]]:
        """The round's useful answers, the place of the next prompt, and how all of them were."""
        want, group = self.rollouts.prompts, self.rollouts.group
        seed = philox(self.policy.config.seed, number)
        found: list[Answer] = []
        drawn: list[Answer] = []
        for attempt in range(self.recipe.attempts):
            missing = want - len(found) // group
            prompts = [self._prompt(place + i) for i in range(missing)]
            place += missing
            answers = self._drawn(prompts, philox(seed, attempt))
            drawn += answers
            for first in range(0, len(answers), group):
                if self.recipe.useful(answers[first : first + group]):
                    found += answers[first : first + group]
            if len(found) == want * group:
                break
        return found, place, statistics(drawn) | {"signal": len(found) / len(drawn)}

    def _drawn(self, prompts: list[Prompt], seed: int) -> list[Answer]:
        """Answers to all of them; this process draws those to some."""
        rank, size = self.ranks.rank, self.ranks.size
        start, stop = len(prompts) * rank // size, len(prompts) * (rank + 1) // size
        some = prompts[start:stop]
        drawn = self.ranks.agreed(
            lambda: self.sampler.draw(some, seed, first=start) if some else []
        )
        return [answer for each in drawn for answer in each or ()]

    def _prompt(self, place: int) -> Prompt:
        [prompt] = self.corpus.at(place)
        assert isinstance(prompt, Prompt)
        return prompt

    def _steps(self, answers: list[Answer]) -> list[Step]:
        """The updates of one epoch, scored: every so-manieth answer is in the same one."""
        skip = self.rollouts.skip_truncated
        rows = [i for i, answer in enumerate(answers) if not (skip and answer.truncated)]
        parts = min(self.rollouts.minibatches, len(rows))
        return [self._step(answers, rows[part::parts]) for part in range(parts)]

    def _step(self, answers: list[Answer], rows: Sequence[int]) -> Step:
        documents = {row: answers[row].document for row in rows}
        groups: list[list[int]] = []
        room = 0
        for row in sorted(rows, key=lambda row: len(documents[row].tokens)):
            room -= len(documents[row].tokens)
            if room < 0:
                groups.append([])
                room = self.rollouts.tokens - len(documents[row].tokens)
            groups[-1].append(row)
        step = []
        for group, batch in zip(
            groups, collate([[documents[row] for row in group] for group in groups]), strict=True
        ):
            sampled = [logprob for row in group for logprob in answers[row].logprobs]
            visited = [answers[row].chosen for row in group]
            chosen = [torch.from_numpy(x) for x in visited if x is not None]
            step.append(
                Minibatch(
                    *(batch, group, {"sampled": torch.tensor(sampled)}, {}),
                    torch.cat(chosen) if chosen else None,
                )
            )
        for minibatch in step[self.ranks.rank :: self.ranks.size]:
            self._score(minibatch)
        scored = self.ranks.gather([minibatch.known for minibatch in step])
        for i, minibatch in enumerate(step):
            minibatch.known.update(scored[i % self.ranks.size][i])
        return step

    @torch.no_grad()
    def _score(self, minibatch: Minibatch) -> None:
        assert minibatch.batch is not None
        batch, known = minibatch.batch.to(self.policy.device), minibatch.known
        routing = Routing()  # who is traced computes all tokens, as in learning: the same products
        states: list[Tensor] | None = [] if self.recipe.values else None
        whole = None if self.ranks.alone else self.sampler.model
        old = self.policy.score(batch, routing, minibatch.chosen, model=whole, states=states)
        known["old"] = old.cpu()
        if minibatch.chosen is not None:
            known["rerouted"] = rerouted(routing)[batch.wanted].cpu()
        if states:
            known["states"] = states[0].float().cpu()
        if self.reference is not None:
            known["reference"] = self.policy.score(batch, model=self.reference).cpu()

    def _gap(self, steps: list[Step]) -> dict[str, float]:
        """How far the sampler is from the trainer, who have the same weights."""
        known = [m.known for step in steps for m in step]
        apart = torch.cat([(k["old"] - k["sampled"]).abs() for k in known])
        mean, limit = float(apart.mean()), self.rollouts.gap
        if limit is None:
            limit = NARROW if self.policy.narrow else 0 if self.rollouts.batch_invariant else WIDE
        if not ((self.compared and limit) or mean <= limit):  # true for NaN
            raise TrainingError(
                f"sampler and trainer have the same weights, but their log-probabilities differ by "
                f"{mean:.2g} a token, more than {limit:g}: what is drawn is not what would be "
                "trained. Compute in float32, or say --gap if this is expected."
            )
        self.compared = True
        found = {"gap": mean, "gap_most": float(apart.max())}
        if self.rollouts.replay_routing:
            found["rerouted"] = float(torch.cat([k["rerouted"] for k in known]).mean())
        return found


def statistics(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over answers: reward and its parts, tokens, and the share that was cut off."""
    n = len(answers)
    found = {
        "reward": sum(answer.reward for answer in answers) / n,
        "length": sum(len(answer.tokens) for answer in answers) / n,
        "truncated": sum(answer.truncated for answer in answers) / n,
    }
    names = answers[0].parts
    return found | {f"reward.{k}": sum(a.parts[k] for a in answers) / n for k in names}
