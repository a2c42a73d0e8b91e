"""Patients of the conformance kit: engines that say what they think of likely tokens.

A patient is any engine that continues a text greedily and tells the log-probabilities of the
likeliest tokens; some tell those of the text's own tokens too. Nothing else is asked of it, so the
reference with a bug planted can be asked the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.backends import load_backend
from gptoss.backends.protocol import Backend, Batch
from gptoss.model.config import ModelConfig
from gptoss.model.weights import Read
from gptoss.verify.mutants import planted

STEPS = 4  # tokens of each answer: they come one at a time, on another path than the prompt
TOP = 10  # candidates asked for at each; mlx-lm gives no more

Thoughts = dict[int, float]  # what was thought of some candidates: token -> logprob
Answers = npt.NDArray[np.float64]  # [S, C], logprobs of the candidates of each step; NaN: none


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer."""

    token: int
    top: Thoughts


@dataclass(frozen=True, slots=True)
class Seen:
    """What a patient made of one text."""

    prompt: list[int]
    steps: list[Step]
    scored: list[Thoughts] = field(default_factory=list)  # behind each token but the last, or none

    @property
    def thoughts(self) -> list[Thoughts]:
        """All, in order."""
        return [*self.scored, *(step.top for step in self.steps)]


Patient = Callable[[list[int]], Seen]  # continues greedily, at most ``STEPS`` tokens


def local(backend: Backend) -> Patient:
    """A backend as a patient."""

    def ask(prompt: list[int]) -> Seen:
        steps: list[Step] = []
        cache = backend.new_cache(max_tokens=len(prompt) + STEPS)
        slot, new, past = cache.open(), prompt, 0
        for _ in range(STEPS):
            logits = backend.to_numpy(backend.forward(Batch.of([new], [past], [slot]), cache))
            logprobs = log_softmax(logits[0])
            best = np.argsort(-logprobs, kind="stable")[:TOP].tolist()
            steps.append(Step(best[0], {t: float(logprobs[t]) for t in best}))
            new, past = [best[0]], past + len(new)
        return Seen(prompt, steps)

    return ask


def answers(config: ModelConfig, read: Read, seen: Sequence[Seen], *bugs: str) -> Answers:
    """What the reference with these bugs says of the candidates that a patient has named."""
    with planted(*bugs), np.errstate(all="ignore"):  # some bugs overflow
        return said(load_backend("reference", config, read), seen)


def said(backend: Backend, seen: Sequence[Seen]) -> Answers:
    """A backend's own logprobs of the same candidates, in the order of rows and tokens."""
    cache = backend.new_cache(max_tokens=sum(len(row.prompt) + STEPS for row in seen))
    slots = [cache.open() for _ in seen]
    thoughts = [row.thoughts for row in seen]
    found: dict[tuple[int, int], list[float]] = {}  # by row and place
    for step in range(max(len(row.steps) for row in seen)):
        here = [r for r, row in enumerate(seen) if step < len(row.steps)]
        new = [[seen[r].steps[step - 1].token] if step else seen[r].prompt for r in here]
        past = [len(seen[r].prompt) + step - 1 if step else 0 for r in here]
        wanted, places, end = list[int](), list[tuple[int, int]](), 0
        for r, tokens in zip(here, new, strict=True):
            end += len(tokens)
            count = 1 if step else len(seen[r].scored) + 1
            wanted += range(end - count, end)
            first = len(seen[r].scored) + step if step else 0
            places += [(r, first + i) for i in range(count)]
        batch = Batch.of(new, past, [slots[r] for r in here], wanted)
        logits = backend.to_numpy(backend.forward(batch, cache))
        for (r, place), logprobs in zip(places, map(log_softmax, logits), strict=True):
            found[r, place] = logprobs[list(thoughts[r][place])].tolist()
    return table([found[key] for key in sorted(found) if found[key]])


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """[V] -> [V], in float64."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    return x


def table(rows: Sequence[Sequence[float]]) -> Answers:
    """Rows of any length as one array, NaN where there is nothing."""
    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found
