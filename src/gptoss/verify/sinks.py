"""What sinks take: the part of attention that a trace point does not show, of queries and keys."""

import numpy as np

from gptoss.model.config import ModelConfig
from gptoss.model.reference import NDArray
from gptoss.model.weights import Read

SCORES = 1 << 23  # attention scores in memory together


def sinks_of(config: ModelConfig, read: Read) -> list[NDArray]:
    """Each layer's, [H]."""
    layers = range(config.num_hidden_layers)
    return [np.asarray(read(f"block.{i}.attn.sinks"), np.float32) for i in layers]


def sink_shares(q: NDArray, k: NDArray, sinks: NDArray, window: int | None) -> NDArray:
    """[t, H] of a row's newest t queries [t, H, d] over all its keys [n, K, d].

    The keys may begin where the first query's window does.
    """
    (t, H, d), (n, K, _) = q.shape, k.shape
    found = np.empty((t, H), np.float32)
    step = max(1, SCORES // (H * n))
    for first in range(0, t, step):
        some = q[first : first + step].reshape(-1, K, H // K, d).transpose(1, 0, 2, 3)
        scores = some.reshape(K, -1, d) @ k.transpose(1, 2, 0) * d**-0.5  # [K, some * H / K, n]
        scores = scores.reshape(K, -1, H // K, n).transpose(1, 0, 2, 3).reshape(-1, H, n)
        age = np.arange(n - t, n)[first : first + step, None] - np.arange(n)
        hidden = (age < 0) | (age >= (window or n))
        scores = np.where(hidden[:, None], -np.inf, scores)
        top = np.maximum(scores.max(axis=-1), sinks)  # [some, H]
        sink = np.exp(sinks - top)
        found[first : first + step] = sink / (sink + np.exp(scores - top[..., None]).sum(axis=-1))
    return found


class Keys:
    """A row's keys so far; of a layer with a window, no more than it may still see."""

    def __init__(self, config: ModelConfig, sinks: list[NDArray]) -> None:
        self.config, self.sinks = config, sinks
        empty = np.empty((0, config.num_key_value_heads, config.head_dim), np.float32)
        self._held = [empty] * len(sinks)  # room, of which as many are keys as ...
        self._count = [0] * len(sinks)
        self._first = [0] * len(sinks)  # the place of the first in its row

    @property
    def nbytes(self) -> int:
        """Memory."""
        return sum(held.nbytes for held in self._held)

    def copy(self) -> "Keys":
        """Another row goes on from here."""
        new = Keys(self.config, self.sinks)
        new._held = [held[:n].copy() for held, n in zip(self._held, self._count, strict=True)]
        new._count, new._first = [*self._count], [*self._first]
        return new

    def shares(self, layer: int, past: int, q: NDArray, k: NDArray) -> NDArray:
        """[t, H]: of the queries [t, H, d] behind ``past`` tokens, whose keys are k [t, K, d].

        NaN where keys before them are not here.
        """
        if past == 0:
            self._first[layer] = self._count[layer] = 0
        old = past - self._first[layer]
        if not 0 <= old <= self._count[layer]:
            return np.full(q.shape[:2], np.nan, np.float32)
        end = old + len(k)
        if end > len(self._held[layer]):
            room = np.empty((2 * end, *k.shape[1:]), np.float32)
            room[:old] = self._held[layer][:old]
            self._held[layer] = room
        held, window = self._held[layer], self.config.window(layer)
        held[old:end] = k
        found = sink_shares(q, held[:end], self.sinks[layer], window)
        if window is not None and end > 4 * window:
            held[:window] = held[end - window : end].copy()
            self._first[layer] += end - window
            end = window
        self._count[layer] = end
        return found
