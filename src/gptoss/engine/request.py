"""What somebody wants: a prompt in tokens, how to draw, and when to stop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Sampling

GREEDY = Sampling(temperature=0.0)
MOST_ROWS = 128  # answers to one request, or its beams


class Constraint(Protocol):
    """Which tokens a grammar allows, one answer at a time. It sees the answer only, no prompt."""

    def mask(self) -> npt.NDArray[np.bool_] | None:
        """[V] true for tokens allowed next; None: all. At least one must be allowed.

        V is the engine's ``vocab_size`` or more; what is beyond is not looked at.
        """

    def accept(self, token: int) -> None:
        """``token`` was drawn (or is a stop token that ended the answer)."""

    def fork(self) -> "Constraint":
        """An independent copy in the same state."""


class Forcing(Constraint, Protocol):
    """A constraint that may also name tokens which need no drawing."""

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, in this order; empty: there is a choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what is wanted of it.

    Rules apply in this order: repetition, frequency and presence penalties, logit bias, the
    constraint and ``min_tokens``, then ``sampling`` (temperature, top-k, top-p, min-p).

    Raises:
        ValueError: with one sentence that names the field.
    """

    prompt: Sequence[int]
    sampling: Sampling = GREEDY
    seed: int = 0  # answer i draws with ``draw.derived(seed, i)``; answer 0 with the seed itself
    stop_tokens: frozenset[int] = frozenset()  # end an answer, and belong to it; empty: ignore_eos
    max_tokens: int | None = None  # of each answer; None: until the room is full
    min_tokens: int = 0  # stop tokens cannot be drawn before these
    n: int = 1  # answers
    best_of: int | None = None  # draw this many, keep the n of highest mean logprob
    beams: int = 0  # width of a beam search, which draws nothing; 0: none
    length_penalty: float = 1.0  # of a beam search: score = sum of logprobs / length ** penalty
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens seen
    frequency_penalty: float = 0.0  # off a logit for each time its token is in the answer
    presence_penalty: float = 0.0  # off a logit once its token is in the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token: added to its logit
    constraint: Constraint | None = None  # forked for each answer; this one is never changed
    logprobs: int | None = None  # None: none; k: of the token drawn, and of the k likeliest
    prompt_logprobs: int | None = None  # the same for each token of the prompt
    boundaries: Sequence[int] = ()  # lengths of prompt prefixes that a later prompt may share
    remember: bool = True  # keep what is computed for prompts that begin alike
    speculate: bool = True  # guess from the sequence's own n-grams; the answer is the same
    timeout: float | None = None  # seconds from submission until it ends with "deadline"
    id: str = ""  # what whoever asked calls it, for who records

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(map(int, self.prompt)))
        object.__setattr__(self, "boundaries", tuple(sorted(set(self.boundaries))))
        self._check_tokens()
        self._check_rows()
        self._check_numbers()

    @property
    def rows(self) -> int:
        """Sequences it takes at once."""
        return self.beams or self.best_of or self.n

    def _check_tokens(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty; the model needs at least one token to continue")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.min_tokens < 0 or self.min_tokens > (self.max_tokens or self.min_tokens):
            raise ValueError(f"min_tokens must be in 0..max_tokens, not {self.min_tokens}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in 0..2**64 - 1, not {self.seed}")
        if bad := [b for b in self.boundaries if not 1 <= b <= len(self.prompt)]:
            raise ValueError(f"boundaries must be in 1..{len(self.prompt)}, not {bad[0]}")

    def _check_rows(self) -> None:
        if not 1 <= self.n <= MOST_ROWS:
            raise ValueError(f"n must be in 1..{MOST_ROWS}, not {self.n}")
        if self.best_of is not None and not self.n <= self.best_of <= MOST_ROWS:
            raise ValueError(f"best_of must be in n..{MOST_ROWS}, not {self.best_of}")
        if self.beams and not self.n <= self.beams <= MOST_ROWS:
            raise ValueError(f"beams must be 0 or in n..{MOST_ROWS}, not {self.beams}")
        if self.beams and self.best_of is not None:
            raise ValueError("best_of and beams exclude each other")

    def _check_numbers(self) -> None:
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise ValueError(
                f"repetition_penalty must be in 0.01..100, not {self.repetition_penalty}"
            )
        for name in ("frequency_penalty", "presence_penalty", "length_penalty"):
            if not abs(getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be finite, not {getattr(self, name)}")
        for token, bias in self.logit_bias.items():
            if not bias < float("inf"):  # -inf forbids a token; NaN and +inf mean nothing
                raise ValueError(f"logit_bias of token {token} must be a number, not {bias}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.timeout is not None and not self.timeout >= 0.0:
            raise ValueError(f"timeout must be 0 seconds or more, not {self.timeout}")
