"""``KV`` for the compiled kernels: keys and values in pages of 128 tokens.

A full layer keeps every page of its row. A sliding layer keeps the pages that its window, and
``SPARE`` tokens of rewinding, still reach, however long the row is. Forks share pages; whoever
writes into a shared one copies it first. What lies in a page: ``csrc/ops/attention.hpp``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss import _core
from gptoss.backends.protocol import Batch
from gptoss.backends.slots import Arrays, StripCache
from gptoss.model.config import ModelConfig

Floats = npt.NDArray[np.float32]

PAGE: int = _core.PAGE  # tokens
SPARE = 128  # tokens that a row can always be rewound from the longest it has been
ALIGNED = 64  # bytes; a vector never straddles two cache lines


class NativeCache(StripCache):
    """Per slot and layer, the pages that hold its keys and values.

    Args:
        config: the model's numbers.
        max_tokens: over all slots together.
        dtype: how keys and values are kept: "bfloat16", "float32" or "int8".

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, config: ModelConfig, max_tokens: int, dtype: str = "bfloat16") -> None:
        self.dtype = dtype
        self.page_bytes: int = _core.page_bytes(dtype, config.num_key_value_heads, config.head_dim)
        super().__init__(config, max_tokens, partial(Strip, self.page_bytes))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values now allocated; a shared page counts once."""
        strips = (strip for strips in self.strips.values() for strip in strips)
        return self.page_bytes * len(
            {id(page) for strip in strips for page in strip.pages.values()}
        )

    def close(self, slot: int) -> None:
        """See ``Cache.close``."""
        for strip in self.strips[slot]:
            strip.head(0)
        super().close(slot)

    def dump(self, slot: int) -> Arrays:
        """See ``RowCache.dump``: page by page, as it lies in memory."""
        strips = enumerate(self.strips[slot])
        return {f"{i}.{p}": page.data for i, strip in strips for p, page in strip.pages.items()}

    def fill(self, slot: int, length: int, arrays: Arrays) -> None:
        """See ``RowCache.fill``."""
        if any(x.shape != (self.page_bytes,) or x.dtype != np.uint8 for x in arrays.values()):
            raise ValueError(f"they are not in pages of {self.page_bytes} bytes")
        strips, last = [], -(-length // PAGE)
        for i, strip in enumerate(self.strips[slot]):
            first = next((p for p in range(last) if f"{i}.{p}" in arrays), last)
            oldest = 0 if strip.window is None else max(0, length - strip.window + 1)
            if first * PAGE > oldest or any(f"{i}.{p}" not in arrays for p in range(first, last)):
                raise ValueError(f"layer {i} lacks pages")
            strips.append((strip, {p: arrays.pop(f"{i}.{p}") for p in range(first, last)}))
        if arrays:
            raise ValueError(f"there is {min(arrays)}, which no row has")
        for strip, pages in strips:
            strip.fill(length, pages)


class Page:
    """Memory for the keys and values of 128 tokens of one layer, and how many strips hold it."""

    __slots__ = ("address", "data", "holders")

    def __init__(self, size: int) -> None:
        raw = np.empty(size + ALIGNED, np.uint8)
        skip = -raw.ctypes.data % ALIGNED
        self.data, self.address = raw[skip : skip + size], raw.ctypes.data + skip
        self.holders = 0


class Strip:
    """One layer of one row: positions ``first`` to ``length - 1``, position p in page p // PAGE.

    ``table[i]`` is the address of page i; of those before the window, and those not yet there, 0.
    Invariant: everything that a query at ``length`` can see is held.
    """

    def __init__(self, page_bytes: int, window: int | None) -> None:
        self.page_bytes, self.window = page_bytes, window
        self.pages: dict[int, Page] = {}
        self.table = np.zeros(4, np.uint64)
        self.gone = self.length = 0  # pages dropped from the front; tokens

    @property
    def first(self) -> int:
        """The oldest position held."""
        return self.gone * PAGE

    def extend(self, t: int) -> None:
        """Make room for ``t`` tokens, in pages that no other strip holds."""
        at = self.length // PAGE
        if self.length % PAGE and self.pages[at].holders > 1:
            mine = Page(self.page_bytes)
            mine.data[:] = self.pages[at].data
            self._drop(at)
            self._place(at, mine)
        for i in range(at, -(-(self.length + t) // PAGE)):
            if i not in self.pages:
                self._place(i, Page(self.page_bytes))

    def advance(self, t: int) -> None:
        """Count ``t`` tokens that have been written; drop what slid out of reach."""
        self.length += t
        if self.window is not None:
            reach = max(0, self.length - self.window + 1 - SPARE) // PAGE
            while self.gone < reach:
                self._drop(self.gone)
                self.gone += 1

    def head(self, length: int, *, shared: bool = False) -> "Strip":
        """The strip as it was when the row had ``length`` tokens; shared: another, in the same
        pages, of which none is copied until one of the two writes.
        """
        if shared:
            new = Strip(self.page_bytes, self.window)
            new.gone, new.length = self.gone, self.length
            for i, page in self.pages.items():
                new._place(i, page)
            return new.head(length)
        self.length = min(length, self.length)
        for i in [i for i in self.pages if i * PAGE >= self.length]:
            self._drop(i)
        if not self.length:
            self.gone = 0
        return self

    def fill(self, length: int, pages: dict[int, npt.NDArray[np.uint8]]) -> None:
        """Be a row of ``length`` tokens, with the bytes of these pages."""
        self.gone, self.length = min(pages), length
        for i, data in pages.items():
            page = Page(self.page_bytes)
            page.data[:] = data
            self._place(i, page)

    def _place(self, i: int, page: Page) -> None:
        if i >= len(self.table):
            self.table = np.concatenate([self.table, np.zeros(max(i, len(self.table)), np.uint64)])
        self.pages[i], self.table[i] = page, page.address
        page.holders += 1

    def _drop(self, i: int) -> None:
        self.pages.pop(i).holders -= 1
        self.table[i] = 0


class NativeView:
    """``KV`` for one step: every row with its own past, all rows in one call."""

    def __init__(self, cache: NativeCache, batch: Batch) -> None:
        self.rows = [cache.strips[slot] for slot in batch.slots.tolist()]
        self.starts, self.past, self.dtype = batch.starts, batch.past, cache.dtype
        self.counts = np.diff(batch.starts).tolist()
        for slot, strips, past in zip(batch.slots, self.rows, batch.past.tolist(), strict=True):
            assert strips[0].length == past, f"slot {slot} holds {strips[0].length} tokens"

    def attend(
        self, layer: int, q: Floats, k: Floats, v: Floats, sinks: Floats, window: int | None
    ) -> Floats:
        """See ``KV.attend``. Tokens may be strided, as slices of a fused projection are."""
        strips: list[Any] = [layers[layer] for layers in self.rows]
        for strip, t in zip(strips, self.counts, strict=True):
            strip.extend(t)
        out = np.empty(q.shape, np.float32)  # [T, H, d]
        tables = [strip.table for strip in strips]
        _core.attend(q, k, v, sinks, out, self.starts, self.past, tables, window or 0, self.dtype)
        for strip, t in zip(strips, self.counts, strict=True):
            strip.advance(t)
        return out


def attend_whole(
    q: Floats, k: Floats, v: Floats, sinks: Floats, window: int | None, lengths: Sequence[int]
) -> Floats:
    """What ``NativeView.attend`` gives rows of these lengths that are all new; nothing is kept."""
    size, out = _core.page_bytes("float32", *k.shape[1:]), np.empty(q.shape, np.float32)
    strips = [Strip(size, None) for _ in lengths]
    for strip, length in zip(strips, lengths, strict=True):
        strip.extend(length)
    starts, past = np.cumsum([0, *lengths], dtype=np.int32), np.zeros(len(lengths), np.int32)
    tables: list[Any] = [strip.table for strip in strips]
    _core.attend(q, k, v, sinks, out, starts, past, tables, window or 0, "float32")
    return out
