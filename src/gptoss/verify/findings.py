"""What was found at a trace point, and how far numbers are apart."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gptoss.model.reference import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One trace point in one mode: where the error was largest, beside what is allowed."""

    mode: str  # isolated, propagated, or stepwise
    point: str
    text: int  # which text
    token: int  # of that text
    error: float  # largest difference, relative to the token's largest value
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether it is small enough; NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"[{'OK' if self.ok else 'WRONG'}] {self.point} token {self.token} {self.error:.1e} "
            f"(text {self.text}, {self.mode}, allowed {self.allowed:.1e})"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {**asdict(self), "ok": self.ok}


See = Callable[[Finding], None]


class Tally:
    """Errors of logits that come some rows of the vocabulary at a time."""

    def __init__(self, tokens: int) -> None:
        self.apart, self.size = np.zeros(tokens), np.zeros(tokens)

    def add(self, ours: NDArray, true: NDArray) -> None:
        """Some more rows, of every token."""
        apart = np.abs(ours - true).max(axis=-1)
        self.apart = np.maximum(self.apart, np.where(np.isnan(apart), np.inf, apart))
        self.size = np.maximum(self.size, np.abs(true).max(axis=-1))

    @property
    def errors(self) -> NDArray:
        """[T], relative to each token's largest logit."""
        return self.apart / np.where(self.size > 0, self.size, 1.0)


def relative(ours: NDArray, true: NDArray) -> NDArray:
    """[T]: the largest difference over the token's largest value; infinite for another shape."""
    if ours.shape != true.shape:
        return np.full(len(true), np.inf)
    axes = tuple(range(1, true.ndim))
    apart, size = np.abs(ours - true).max(axis=axes), np.abs(true).max(axis=axes)
    return np.where(np.isfinite(apart), apart / np.where(size > 0, size, 1.0), np.inf)


def worst(ours: NDArray, true: NDArray) -> float:
    """Of the first tokens, as many as ours are."""
    return float(relative(ours, true[: len(ours)]).max())
