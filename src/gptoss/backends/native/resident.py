"""Experts that stay on disk: the router's choice is read ahead, what was used longest ago let go.

Left to itself, the system reads a mapped file when a page is touched, a piece at a time, and the
processor waits for each. Here all that a layer is about to use is asked for before its first
product, and of experts no more than a budget stays mapped. What is let go the system may still
have cached, and gives up when memory is short: nothing here can be swapped.

Only mapped files are advised, through their own mapping, so memory of another kind cannot be hit.
Where the system takes no such advice (Windows), nothing is done.
"""

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.model.mxfp4 import Packed
from gptoss.model.weights import Stored

PIECE = 1 << 20  # bytes; of more, Linux reads only what the disk takes at once or its readahead
AROUND = 1 << 16  # bytes that Linux maps around a page that is touched


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A part of a mapped file."""

    mapped: mmap.mmap
    start: int  # of its first byte in the mapping
    stop: int

    def will_need(self) -> None:
        """Begin to read it, if it is not in memory. Returns before it is."""
        for start in range(self.start - self.start % mmap.PAGESIZE, self.stop, PIECE):
            self._advise("MADV_WILLNEED", start, min(start + PIECE, self.stop))

    def let_go(self) -> None:
        """Drop it from this process, and the little around it that came along unasked."""
        start = max(0, self.start - AROUND)
        stop = min(self.stop + AROUND, len(self.mapped))
        self._advise("MADV_DONTNEED", start - start % mmap.PAGESIZE, stop)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        if stop > start and hasattr(mmap, advice):
            self.mapped.madvise(getattr(mmap, advice), start, stop - start)


def spans(stored: Stored, first: int, count: int) -> list[Span]:
    """Where ``count`` items of the first axis lie in mapped files; nothing of other memory.

    Raises:
        ValueError: there are no such items.
    """
    if isinstance(stored, Packed):
        return spans(stored.blocks, first, count) + spans(stored.scales, first, count)
    if count < 1 or not 0 <= first <= len(stored) - count:
        raise ValueError(f"items {first} to {first + count - 1} of {len(stored)} are not there")
    mapped = _mapping(stored)
    if mapped is None or not stored.flags.c_contiguous:
        return []
    start = _address(stored[first:]) - _address(np.frombuffer(mapped, np.uint8))
    return [Span(mapped, start, start + stored[first : first + count].nbytes)]


def let_go(stored: Stored) -> None:
    """Drop what has been read of these numbers from this process, if they lie in a mapped file."""
    for span in spans(stored, 0, stored.shape[0]):
        span.let_go()


class Resident:
    """The experts that are mapped, by when they were last used, within a budget."""

    def __init__(self, budget: int) -> None:
        """``budget``: bytes; what one layer's step uses stays even if that is more.

        Raises:
            ValueError: no budget at all.
        """
        if budget < 1:
            raise ValueError(f"the budget of resident experts must be 1 byte or more, not {budget}")
        self.budget, self.bytes = budget, 0
        self._held: OrderedDict[tuple[Any, int], int] = OrderedDict()  # the last used is last
        self._stored: dict[Any, Stored] = {}  # what each matrix stands for

    def watch(self, matrix: Any, stored: Stored) -> None:
        """From now on ``matrix`` stands for the experts ``stored``, [E, ...]."""
        self._stored[matrix] = stored

    def use(self, matrices: Sequence[Any], chosen: npt.NDArray[np.int32]) -> None:
        """These experts are needed now: what is not here is read ahead, all of it at once."""
        experts = np.unique(chosen).tolist()
        used = [(matrix, e) for matrix in matrices for e in experts]
        for key in used:
            if key in self._held:
                self._held.move_to_end(key)
            else:
                self._held[key] = self._fetch(*key)
                self.bytes += self._held[key]
        while self.bytes > self.budget and len(self._held) > len(used):
            (matrix, e), n = self._held.popitem(last=False)
            self.bytes -= n
            for span in spans(self._stored[matrix], e, 1):
                span.let_go()

    def _fetch(self, matrix: Any, e: int) -> int:
        """Bytes of an expert that is being read from now on."""
        places = spans(self._stored[matrix], e, 1)
        for span in places:
            span.will_need()
        return sum(span.stop - span.start for span in places)

    def settle(self) -> None:
        """Let go of all the files: what loading has read of them is not needed any more."""
        places = [span for stored in self._stored.values() for span in spans(stored, 0, 1)]
        for mapped in {span.mapped for span in places}:
            Span(mapped, 0, len(mapped)).let_go()


def _mapping(array: npt.NDArray[Any]) -> mmap.mmap | None:
    """The file an array lies in, if it cannot be written through it: changes would be lost."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if not isinstance(mapped, mmap.mmap) or not memoryview(mapped).readonly:
        return None
    return mapped


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
