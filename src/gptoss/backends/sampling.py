"""The sampling rule, and its host version for backends whose logits live there anyway."""

from collections.abc import Sequence
from math import isfinite
from typing import Literal

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Sampling

PARTS = 1024  # of the logits' range


def sample_rows(
    logits: npt.NDArray[np.float32], rules: Sequence[Sampling], uniforms: Sequence[float]
) -> list[int]:
    """One token per row of [R, V] logits. See ``Backend.sample``."""
    return [sample(*row) for row in zip(logits, rules, uniforms, strict=True)]


def sample(logits: npt.NDArray[np.float32], rule: Sampling, uniform: float) -> int:
    """Draw from the filtered softmax of [V] logits by inverting its CDF at ``uniform``.

    Temperature first, then top-k, top-p and min-p, each on what the one before left, likeliest
    first; ties break towards the smaller token id.

    Where that is no distribution (NaN, +inf or nothing but -inf among the logits) the answer is
    NumPy's ``argmax``, without a warning: who cannot trust the model looks at the logits.
    """
    best = float(logits.max())
    if rule.temperature == 0.0 or not isfinite(best):
        return int(logits.argmax())
    tokens = likeliest(logits, rule.top_k) if 0 < rule.top_k < len(logits) else None
    ranked = Ranked(logits if tokens is None else logits[tokens], best, rule.temperature)
    kept = ranked.total
    if rule.top_p < 1.0:
        kept = ranked.at(rule.top_p * ranked.total, "left")[1]
    if rule.min_p > 0.0:
        kept = min(kept, float(ranked.mass[ranked.mass >= rule.min_p].sum()))
    place, _ = ranked.at(uniform * kept, "right")
    return place if tokens is None else int(tokens[place])


class Ranked:
    """Masses of [V] logits in descending order, without sorting more of them than is looked at.

    A vocabulary is large and one place of its order is wanted: equal parts of the logits' range are
    summed first, and only the part where the place lies is sorted.
    """

    def __init__(self, logits: npt.NDArray[np.float32], best: float, temperature: float) -> None:
        self.logits = logits
        with np.errstate(over="ignore"):  # -inf is right where it is too far down, or too cold
            self.mass = logits.astype(np.float64)  # in place from here on: large arrays cost more
            self.mass -= best  # than the arithmetic
            self.mass /= temperature
            np.exp(self.mass, out=self.mass)
            below = np.float32(best) - logits
        span = float(below.max())
        if span == np.inf:
            span = float(below.max(where=below < np.inf, initial=0.0))
            np.minimum(below, span, out=below)
        below *= np.float32(min((PARTS - 1) / span, 3e38) if span else 1.0)
        np.minimum(below, PARTS - 1, out=below)
        self.part = below.astype(np.intp)
        self.cdf = np.bincount(self.part, self.mass, PARTS).cumsum()
        self.total = float(self.cdf[-1])

    def at(self, target: float, side: Literal["left", "right"]) -> tuple[int, float]:
        """Where the sum of the largest masses reaches ``target`` ("right": passes it): the place
        in ``logits``, and the sum with it."""
        last = int(np.searchsorted(self.cdf, self.total, "left"))
        part = min(int(np.searchsorted(self.cdf, target, side)), last)
        places = np.flatnonzero(self.part == part)
        places = places[np.argsort(-self.logits[places], kind="stable")]
        cdf = self.mass[places].cumsum() + (self.cdf[part - 1] if part else 0.0)
        i = min(int(np.searchsorted(cdf, target, side)), len(places) - 1)
        return int(places[i]), float(cdf[i])


def likeliest(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp]:
    """Ids of the k largest of [V], ascending; of equals, smaller ids first."""
    least = np.partition(logits, len(logits) - k)[len(logits) - k]
    above = np.flatnonzero(logits > least)
    equal = np.flatnonzero(logits == least)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))
