"""Which planted bug a patient may have: the one whose answers are nearest to its own.

Right is one of them. What the nearest leaves unexplained is the patient's noise.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoss.errors import GptOssError
from gptoss.model.config import ModelConfig
from gptoss.model.weights import Read
from gptoss.verify.mutants import BUGS
from gptoss.verify.patients import TOP, Answers, Patient, answers, table

RIGHT = "right"  # stands among the bugs for having none
SIGMAS = 5.0  # standard deviations of the noise by which an explanation must be worse to be out
FLOOR = 1e-5  # nats: float32's own noise
CAP = 0.2  # nats that one step counts at most: a near tie between experts may turn over
NEAR = 0.3  # of what half of the bugs make: an explanation so near is one


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """How well the reference, right and with each bug, says what a patient said."""

    apart: dict[str, float]  # root mean square nats from it, the nearest first; RIGHT is no bug
    worse: dict[str, float]  # by how many standard deviations of the noise than the nearest
    typical: float  # nats that a bug makes: the median

    @property
    def fits(self) -> list[str]:
        """What cannot be told from the nearest."""
        return [name for name in self.apart if self.worse[name] < SIGMAS]

    @property
    def healthy(self) -> bool:
        """Being right is among what fits, and near."""
        return RIGHT in self.fits and self.apart[RIGHT] <= NEAR * self.typical

    @property
    def suspects(self) -> list[str]:
        """The bugs that explain it, and better than being right does, the best first."""
        return [] if RIGHT in self.fits or not self.explained else self.fits

    @property
    def explained(self) -> bool:
        """Whether the nearest is near."""
        return min(self.apart.values()) <= NEAR * self.typical

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        verdict = {"healthy": self.healthy, "explained": self.explained, "suspects": self.suspects}
        return {**verdict, "fits": self.fits, "nats": self.apart, "sigmas": self.worse}

    def __str__(self) -> str:
        right, best = self.apart[RIGHT], next(iter(self.apart))
        lines = [f"{right:.1e} nats from the reference; a bug makes {self.typical:.1e}"]
        if self.suspects:
            lines += [f"behaves as if: {name} ({self.apart[name]:.1e})" for name in self.suspects]
        elif self.healthy:
            lines += ["behaves as the reference does"]
            unseen = [name for name in self.fits if name != RIGHT]
            lines += [f"would not have been seen: {', '.join(unseen)}"] if unseen else []
        if not self.explained:
            lines += [f"no bug of the list explains it; the nearest: {best}"]
            lines += ["another checkpoint than this one looks like that too"]
        return "\n".join(lines)


def judge(theirs: Answers, ours: dict[str, Answers]) -> Diagnosis:
    """``ours``: what the reference says with each bug, and under ``RIGHT`` as it is.

    The bug that leaves the least unexplained is taken for the patient's, and what it leaves for
    noise, of which another bug must be seen to leave more.
    """
    left = {name: _squares(theirs, said) for name, said in ours.items()}
    order = sorted(left, key=lambda name: (left[name], name != RIGHT))
    best = order[0]
    noise = max(math.sqrt(left[best] / len(theirs)), FLOOR)
    worse = {}
    for name in order:
        between = math.sqrt(_squares(ours[best], ours[name]))
        gap = math.sqrt(TOP) * (left[name] - left[best])
        worse[name] = gap / (2.0 * noise * between) if between else 0.0
    effects = [distance(ours[RIGHT], said) for name, said in ours.items() if name != RIGHT]
    apart = {name: math.sqrt(left[name] / len(theirs)) for name in order}
    return Diagnosis(apart=apart, worse=worse, typical=float(np.median(effects)))


def diagnose(
    config: ModelConfig,
    read: Read,
    patient: Patient,
    prompts: Iterable[list[int]],
    watch: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Ask the patient, then the reference with every bug.

    If a bug fits better than none, every other is tried beside it: engines may have two.

    Raises:
        GptOssError: the patient answers nothing or in other tokens, or as the patient raises.
    """
    seen = [row for row in map(patient, prompts) if row.steps]
    told = [thoughts for row in seen for thoughts in row.thoughts if thoughts]
    if not told:
        raise GptOssError("not one probe was answered with log-probabilities")
    if any(not 0 <= token < config.vocab_size for thoughts in told for token in thoughts):
        raise GptOssError("the patient knows other tokens: it must run the same checkpoint")
    theirs = table([[*thoughts.values()] for thoughts in told])
    ours = {RIGHT: answers(config, read, seen)}
    for i, name in enumerate(BUGS):
        ours[name] = answers(config, read, seen, name)
        if watch is not None:
            watch(i + 1, len(BUGS))
    found = judge(theirs, ours)
    if RIGHT in found.fits:
        return found
    first = BUGS[found.fits[0]]
    for other in BUGS.values():
        if (other.module, other.right) == (first.module, first.right):
            continue
        with suppress(ValueError):  # the one has rewritten the other's passage
            ours[f"{first.name} + {other.name}"] = answers(
                config, read, seen, first.name, other.name
            )
    both = judge(theirs, ours)
    return both if both.worse[first.name] >= SIGMAS else found


def distance(a: Answers, b: Answers) -> float:
    """Root mean square nats between two patients' logprobs."""
    return math.sqrt(_squares(a, b) / len(a))


def _squares(a: Answers, b: Answers) -> float:
    """Mean square nats of each step, at most ``CAP`` squared, summed over steps.

    The mean of a step's candidates is taken off: some engines leave padding out of their softmax.
    """
    apart = a - b
    with np.errstate(invalid="ignore"):
        apart = apart - np.nanmean(apart, axis=1, keepdims=True)
        each = np.nanmean(apart * apart, axis=1)
    return float(np.where(np.isfinite(each), np.minimum(each, CAP * CAP), CAP * CAP).sum())
