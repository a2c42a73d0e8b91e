"""Who holds how much of a cache: the bookkeeping every room shares, with no bytes in it."""

from gptoss.errors import CacheFull


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
