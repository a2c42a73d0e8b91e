"""Who holds how much of a cache: the bookkeeping that rooms share, with no bytes in it."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gptoss.errors import CacheFull, CacheMiss
from gptoss.model.config import ModelConfig

Arrays = dict[str, npt.NDArray[Any]]


class Slots:
    """Slot numbers and the tokens reserved under each, within one budget."""

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        self.max_tokens = max_tokens
        self.reserved: dict[int, int] = {}
        self.next_slot = 0

    def open(self) -> int:
        """See ``Cache.open``."""
        slot, self.next_slot = self.next_slot, self.next_slot + 1
        self.reserved[slot] = 0
        return slot

    def reserve(self, slot: int, length: int) -> None:
        """See ``Cache.reserve``."""
        left = self.max_tokens - sum(n for s, n in self.reserved.items() if s != slot)
        if length > left:
            raise CacheFull(f"{length} tokens asked, {left} left of {self.max_tokens}")
        self.reserved[slot] = max(length, self.reserved[slot])

    def truncate(self, slot: int, length: int) -> None:
        """Keep room for ``length`` tokens only."""
        self.reserved[slot] = min(length, self.reserved[slot])

    def close(self, slot: int) -> None:
        """See ``Cache.close``."""
        del self.reserved[slot]


class Strip(Protocol):
    """One layer of one row: positions ``first`` to ``length - 1`` are held."""

    window: int | None  # how far back tokens look; None: to the beginning
    length: int  # positions seen

    @property
    def first(self) -> int:
        """The oldest position."""
        ...


class StripCache(Slots):
    """A cache whose rows are lists of strips, one a layer: what such rooms have in common.

    A strip has ``head(length, shared=...)``, itself when the row had so many tokens, for another
    row (shared) or for the same; ``host()``, NumPy arrays [1, K, held, ...] of what it holds; and
    ``of(arrays, length)``, such a strip again.
    """

    def __init__(self, config: ModelConfig, max_tokens: int, blank: Callable[[int | None], Any]):
        """``blank``: an empty strip of a layer with such a window."""
        super().__init__(max_tokens)
        self.config, self.blank = config, blank
        self.strips: dict[int, list[Any]] = {}  # by slot, then by layer

    def open(self) -> int:
        """See ``Cache.open``."""
        slot, layers = super().open(), range(self.config.num_hidden_layers)
        self.strips[slot] = [self.blank(self.config.window(i)) for i in layers]
        return slot

    def truncate(self, slot: int, length: int) -> None:
        """See ``Cache.truncate``."""
        check_held(slot, length, self.strips[slot])
        super().truncate(slot, length)
        self.strips[slot] = [strip.head(length) for strip in self.strips[slot]]

    def fork(self, slot: int, length: int) -> int:
        """See ``Cache.fork``."""
        check_held(slot, length, self.strips[slot])
        child = self.open()
        try:
            self.reserve(child, length)
        except BaseException:
            self.close(child)
            raise
        self.strips[child] = [strip.head(length, shared=True) for strip in self.strips[slot]]
        return child

    def close(self, slot: int) -> None:
        """See ``Cache.close``."""
        super().close(slot)
        del self.strips[slot]

    def dump(self, slot: int) -> Arrays:
        """See ``RowCache.dump``."""
        hosts = [strip.host() for strip in self.strips[slot]]
        return {f"{i}.{j}": x for i, host in enumerate(hosts) for j, x in enumerate(host)}

    def fill(self, slot: int, length: int, arrays: Arrays) -> None:
        """See ``RowCache.fill``."""
        strips = []
        for i, strip in enumerate(self.strips[slot]):
            blank, window = strip.host(), strip.window
            found = [arrays.pop(f"{i}.{j}", np.zeros(0)) for j in range(len(blank))]
            held = found[0].shape[2] if found[0].ndim == 4 else 0
            least = length if window is None else min(length, window - 1)
            fits = [
                x.dtype == b.dtype and x.shape == (*b.shape[:2], held, *b.shape[3:])
                for x, b in zip(found, blank, strict=True)
            ]
            if not (all(fits) and least <= held <= length):
                raise ValueError(f"layer {i} is not as it is kept")
            strips.append(strip.of(found, length))
        if arrays:
            raise ValueError(f"there is {min(arrays)}, which no row has")
        self.strips[slot] = strips


def check_held(slot: int, length: int, strips: Iterable[Strip]) -> None:
    """Raise CacheMiss unless every layer still holds what a token at ``length`` looks at."""
    for strip in strips:
        if length and strip.window and strip.first > max(0, length - strip.window + 1):
            raise CacheMiss(
                f"slot {slot} was asked for its first {length} tokens, but its sliding layers "
                f"hold positions {strip.first} to {strip.length - 1} only"
            )
