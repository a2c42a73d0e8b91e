"""Canonical tensors -> the values a layout stores, in pieces small enough for any machine.

Dense values become bfloat16, rounded to nearest, ties to even; what is not finite then is refused,
never written. Values that MXFP4 can hold survive
any chain of conversions exactly; from packed to packed the bytes themselves are copied.
"""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gptoss.checkpoint.layout import Entry
from gptoss.checkpoint.mlx import rows_of
from gptoss.errors import CheckpointError
from gptoss.model.mxfp4 import Packed, Rule, encode
from gptoss.model.weights import Read, Stored

Array = npt.NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
PIECE = 32 << 20  # bytes, about, that are written together
STRIP = 64  # rows decoded or encoded at a time, by one thread
THREADS = min(8, os.cpu_count() or 1)


class Source:
    """Cuts canonical tensors into the pieces that a layout stores, at most an expert at a time."""

    def __init__(
        self, read: Read, shapes: dict[str, tuple[int, ...]], rule: Rule, pool: ThreadPoolExecutor
    ) -> None:
        self._read, self._shapes, self._rule, self._pool = read, shapes, rule, pool

    def pieces(self, canonical: str, entries: list[Entry]) -> Iterator[Array]:
        """The values of ``entries``, all cut from one tensor, in order and ready to be written."""
        stored = self._read(canonical)
        if stored.shape != self._shapes[canonical]:
            raise ValueError(
                f"{canonical} must have the shape {self._shapes[canonical]}, not {stored.shape}"
            )
        if entries[0].part == "transposed":
            yield from self._transposed(stored, canonical)
        elif entries[0].part == "words":
            for words, scales in zip(entries[::2], entries[1::2], strict=True):
                assert (words.part, scales.part, words.half) == ("words", "scales", scales.half)
                yield from self._packed(stored[rows_of(words)], canonical)
        elif entries[0].part == "half":
            assert isinstance(stored, np.ndarray), f"{canonical} is packed, but a vector"
            for entry in entries:
                yield from (_bf16(slab, canonical) for slab in _slabs(stored[rows_of(entry)]))
        elif entries[0].part == "blocks":
            assert [entry.part for entry in entries] == ["blocks", "scales"], entries
            yield from self._packed(stored, canonical)
        else:
            assert isinstance(stored, np.ndarray), f"{canonical} is packed, but not an expert"
            for entry in entries:
                rows = stored[slice(*entry.rows)] if entry.part == "rows" else stored
                yield from (_bf16(slab, canonical) for slab in _slabs(rows))

    def _packed(self, stored: Stored, canonical: str) -> Iterator[Array]:
        """All nibbles, then all scales; of dense experts the scales (1/17) wait in memory."""
        if isinstance(stored, Packed):
            yield from _slabs(stored.blocks)
            yield from _slabs(stored.scales)
            return
        scales = []
        for expert in stored:
            matrix = np.ascontiguousarray(expert)
            strips = (matrix[i : i + STRIP] for i in range(0, len(matrix), STRIP))
            try:
                for strip in self._pool.map(lambda x: encode(x, self._rule), strips):
                    yield strip.blocks
                    scales.append(strip.scales)
            except ValueError as error:
                raise CheckpointError(f"{canonical}: {error}") from None
            forget(expert)
        yield from scales

    def _transposed(self, stored: Stored, canonical: str) -> Iterator[Array]:
        """Every expert as bfloat16 [columns, rows]."""
        for i in range(stored.shape[0]):
            expert = stored[i]
            if isinstance(expert, Packed):
                yield self._decoded(expert, canonical)
                forget(expert.blocks)
            else:
                yield np.ascontiguousarray(_bf16(expert.T, canonical))
                forget(expert)

    def _decoded(self, packed: Packed, canonical: str) -> Array:
        rows, columns = packed.shape
        out = np.empty((columns, rows), BF16)

        def fill(i: int) -> None:
            out[:, i : i + STRIP] = _bf16(packed[i : i + STRIP].decode(), canonical).T

        list(self._pool.map(fill, range(0, rows, STRIP)))
        return out


def _bf16(values: Array, canonical: str) -> Array:
    """``values`` as bfloat16, if every one of them is finite so."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(BF16, copy=False)
    if rounded.size and (rounded.view(np.uint16) & 0x7FFF).max() >= 0x7F80:  # an exponent of ones
        raise CheckpointError(
            f"{canonical}: holds an infinity, a NaN, or a number too large for bfloat16. The "
            "source is damaged, or the training that wrote it diverged."
        )
    return rounded


def _slabs(array: Array) -> Iterator[Array]:
    """``array`` along its first axis, about ``PIECE`` bytes at a time."""
    step = max(1, PIECE * len(array) // array.nbytes)
    for i in range(0, len(array), step):
        yield array[i : i + step]
        forget(array)


def forget(array: Array) -> None:
    """Give back the memory of a mapped file once its bytes are written; they can be read again.

    Without this a conversion seems to hold the whole checkpoint, and on a small machine it does.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    # Only a read-only mapping: of others, the system would drop changes made in memory.
    if not isinstance(mapped, mmap.mmap) or not memoryview(mapped).readonly:
        return
    if hasattr(mmap, "MADV_DONTNEED"):  # Windows has no such advice
        mapped.madvise(mmap.MADV_DONTNEED)
