"""What logits say: the likeliest tokens, and how likely the one was that came.

The same of every layer's residual stream, as if it were the last: final norm, then unembedding
(the "logit lens", nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru). The
vocabulary is taken a slice at a time, because the logits of every layer would not fit.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gptoss.model.config import ModelConfig
from gptoss.model.reference import NDArray, NumpyOps, unpack
from gptoss.model.weights import Read

SLICE = 16_384  # rows of the vocabulary whose logits are computed together
ROWS = 3_072  # and for so many residuals


@dataclass(frozen=True, slots=True)
class Reading:
    """N rows of logits, read."""

    likeliest: NDArray  # int [N, k], tokens, best first
    logprobs: NDArray  # [N, k]
    came: NDArray  # [N], the log-probability of what came; NaN where nothing did
    rank: NDArray  # int [N], 1: it was the likeliest; 0 where nothing came


def read_logits(
    parts: Iterable[tuple[int, NDArray]], came: NDArray, truth: NDArray, k: int
) -> Reading:
    """Read logits that arrive in slices of the vocabulary.

    Args:
        parts: (first token, logits [N, tokens from there on]).
        came: int [N], the token that came next, -1 where there is none.
        truth: [N], its logit.
        k: how many of the likeliest.
    """
    rows = np.arange(len(came))
    best = np.full((len(came), k), -np.inf)
    likeliest = np.zeros((len(came), k), np.int64)
    peak, total = np.full(len(came), -np.inf), np.zeros(len(came))
    rank = np.where(came < 0, 0, 1)
    for first, logits in parts:
        some = min(k, logits.shape[1])
        here = np.argpartition(-logits, some - 1, axis=1)[:, :some]
        found = np.concatenate([best, np.take_along_axis(logits, here, axis=1)], axis=1)
        names = np.concatenate([likeliest, here + first], axis=1)
        order = np.argsort(-found, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(found, order, axis=1)
        likeliest = np.take_along_axis(names, order, axis=1)
        higher = np.maximum(peak, best[:, 0])
        total = total * np.exp(peak - higher) + np.exp(logits - higher[:, None]).sum(axis=1)
        peak = higher
        above = logits > truth[:, None]
        own = (came >= first) & (came < first + logits.shape[1])
        above[rows[own], came[own] - first] = False  # its own logit, rounded otherwise
        rank += np.where(came < 0, 0, above.sum(axis=1))
    whole = peak + np.log(total)
    logprobs = best - whole[:, None]
    return Reading(likeliest, logprobs, np.where(came < 0, np.nan, truth - whole), rank)


class Lens:
    """Final norm and unembedding of a checkpoint, for residuals of any layer."""

    def __init__(self, config: ModelConfig, read: Read) -> None:
        self.ops, self.eps = NumpyOps(), config.rms_norm_eps
        self.scale = unpack(read("norm.scale"), np.float32)
        stored = read("unembedding.weight")  # [V, D], widened a slice at a time
        assert isinstance(stored, np.ndarray)
        self.unembedding = stored

    def read(self, residual: NDArray, came: NDArray, k: int) -> Reading:
        """[N, D] residuals; see ``read_logits``."""
        parts = [
            self._some(residual[i : i + ROWS], came[i : i + ROWS], k)
            for i in range(0, len(residual), ROWS)
        ]
        names = Reading.__slots__
        return Reading(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def _some(self, residual: NDArray, came: NDArray, k: int) -> Reading:
        x = self.ops.rms_norm(np.asarray(residual, np.float32), self.scale, self.eps)
        truth = (x * unpack(self.unembedding[np.maximum(came, 0)], np.float32)).sum(axis=1)
        return read_logits(self._logits(x), came, truth, k)

    def _logits(self, x: NDArray) -> Iterator[tuple[int, NDArray]]:
        for first in range(0, len(self.unembedding), SLICE):
            rows = unpack(self.unembedding[first : first + SLICE], np.float32)
            yield first, self.ops.linear(x, rows, None)
