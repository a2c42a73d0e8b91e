"""Who holds how much of a cache: the bookkeeping every room shares, with no bytes in it."""

from collections.abc import Iterable
from typing import Protocol

from gptoss.errors import CacheFull, CacheMiss


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

    @property
    def window(self) -> int | None:
        """How far back tokens look; None: to the beginning."""
        ...

    @property
    def first(self) -> int:
        """The oldest position."""
        ...

    @property
    def length(self) -> int:
        """Positions seen."""
        ...


def check_held(slot: int, length: int, strips: Iterable[Strip]) -> None:
    """Raise CacheMiss unless every layer still holds what a token at ``length`` looks at."""
    for strip in strips:
        if length and strip.window and strip.first > max(0, length - strip.window + 1):
            raise CacheMiss(
                f"slot {slot} was asked for its first {length} tokens, but its sliding layers "
                f"hold positions {strip.first} to {strip.length - 1} only"
            )
