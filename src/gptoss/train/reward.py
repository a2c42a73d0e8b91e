"""Rewards: plain functions that say how good an answer is, and sums of them.

    def reward(prompt, reply, messages, example) -> float: ...

``prompt``: the messages before the model's turn. ``reply``: the text of its final message, "" if it
did not come to one. ``messages``: its whole turn, parsed. ``example``: the line of the data file.

A sum is told as its terms: ``["exact", "0.1*format", "my_rewards.py:short", "package.module:f"]``.
"""

import math
import pkgutil
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss.errors import TrainingError
from gptoss.text.messages import Message

Reward = Callable[[list[Message], str, list[Message], dict[str, Any]], float]


def exact(
    prompt: list[Message], reply: str, messages: list[Message], example: dict[str, Any]
) -> float:
    """1 if the reply is the example's ``answer``, but for the space around it."""
    if "answer" not in example:
        raise ValueError("the line has no answer to compare with")
    return float(reply.strip() == str(example["answer"]).strip())


def well_formed(
    prompt: list[Message], reply: str, messages: list[Message], example: dict[str, Any]
) -> float:
    """1 if the turn is thoughts and then one final message or a call, with nothing to mend."""
    ends = [m.channel == "final" or m.recipient is not None for m in messages]
    return float(ends[-1:] == [True] and sum(ends) == 1 and not any(m.repairs for m in messages))


def brief(
    prompt: list[Message], reply: str, messages: list[Message], example: dict[str, Any]
) -> float:
    """Minus one for every 1,000 characters that were said or thought."""
    return -sum(len(m.content) for m in messages if isinstance(m.content, str)) / 1000.0


OURS: dict[str, Reward] = {"exact": exact, "format": well_formed, "brief": brief}


@dataclass(frozen=True, slots=True)
class Term:
    """One function of a sum."""

    name: str
    weight: float
    function: Reward


class Rewards:
    """A sum of rewards.

    Args:
        terms: functions, or how they are told: see the module.

    Raises:
        TrainingError: there is no such function.
        ValueError: a weight that is no number, or two terms with the same name.
    """

    def __init__(self, terms: Sequence[str | Reward]) -> None:
        self.terms = [_term(term) for term in terms]
        if not terms or len({*self.names}) < len(terms):
            raise ValueError(f"rewards: expected at least one, each once, not {self.names}")

    @property
    def names(self) -> list[str]:
        """Of the terms."""
        return [term.name for term in self.terms]

    @property
    def told(self) -> list[str]:
        """The terms with their weights: what a run that goes on must agree on."""
        return [f"{term.weight:g}*{term.name}" for term in self.terms]

    def __call__(
        self,
        prompt: list[Message],
        messages: list[Message],
        example: dict[str, Any],
        origin: str,
    ) -> tuple[float, dict[str, float]]:
        """The sum, and each term before its weight.

        Raises TrainingError, which names the function and the example, if one raises.
        """
        reply = "".join(str(m.content) for m in messages if m.channel == "final")
        parts = {}
        for term in self.terms:
            try:
                parts[term.name] = float(term.function(prompt, reply, messages, example))
            except Exception as error:
                raise TrainingError(
                    f"{origin}: the reward {term.name} raised {type(error).__name__}: {error}. "
                    "Nothing is lost: mend it, and the same command goes on."
                ) from error
            if not math.isfinite(parts[term.name]):
                raise TrainingError(
                    f"{origin}: the reward {term.name} is {parts[term.name]}, which is no number "
                    "to learn from. Nothing is lost: mend it, and the same command goes on."
                )
        return sum(term.weight * parts[term.name] for term in self.terms), parts


def _term(told: str | Reward) -> Term:
    if not isinstance(told, str):
        return Term(getattr(told, "__name__", repr(told)), 1.0, told)
    weight, star, name = told.partition("*")
    try:
        factor = float(weight) if star else 1.0
    except ValueError:
        raise ValueError(f"reward {told!r}: {weight!r} is no weight; write 0.1*name") from None
    name = name if star else told
    return Term(name, factor, OURS[name] if name in OURS else _load(name))


def _load(name: str) -> Reward:
    """The function called ``module:function`` or ``path.py:function``."""
    where, colon, function = name.rpartition(":")
    if not colon:
        raise TrainingError(
            f"reward {name!r}: there are {', '.join(OURS)}; others are told as module:function or "
            "path.py:function"
        )
    try:
        if where.endswith(".py"):
            found = runpy.run_path(where)[function]
        else:
            found = pkgutil.resolve_name(name)
    except Exception as error:  # the file may do anything while it is read
        raise TrainingError(f"reward {name!r}: cannot be loaded: {error!r}") from error
    if not callable(found):
        raise TrainingError(f"reward {name!r}: is no function")
    loaded: Reward = found
    return loaded
