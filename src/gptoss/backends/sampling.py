"""The sampling rule, and its host version for backends whose logits live there anyway."""

from collections.abc import Sequence
from math import isfinite

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Sampling


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
    order = np.argsort(-logits, kind="stable")
    if rule.top_k:
        order = order[: rule.top_k]
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is right, the likeliest stays at 0
        scaled = (logits[order].astype(np.float64) - best) / rule.temperature
    p = np.exp(scaled)
    p /= p.sum()
    keep = len(p)
    if rule.top_p < 1.0:
        keep = min(keep, int(np.searchsorted(p.cumsum(), rule.top_p)) + 1)
    if rule.min_p > 0.0:
        keep = min(keep, int(np.searchsorted(-p, -rule.min_p * p[0], side="right")))
    cdf = p[:keep].cumsum()
    return int(order[min(int(np.searchsorted(cdf, uniform * cdf[-1], side="right")), keep - 1)])
