"""Where tensors lie while nobody computes with them.

``Host`` is main memory beside a GPU, pinned so that copies need no detour. ``Disk`` is a file that
is mapped: its pages come in as they are read and go out when they are forgotten, and what was
written stays. Its files have no names, so that a killed process leaves nothing.
"""

import ctypes
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gptoss.errors import TrainingError

SMALL = 1 << 16  # bytes
M_MMAP_THRESHOLD = -3  # of malloc.h
FIRST, LARGEST = 1 << 20, 1 << 30  # bytes of a file on disk; each is as large as all before it


class Shelf(Protocol):
    """A place for tensors."""

    def put(self, x: Tensor) -> Tensor:
        """``x`` as it lies here; itself if it does."""

    def fetch(self, kept: Tensor, device: torch.device) -> Tensor:
        """What lies here, to compute with."""

    def store(self, kept: Tensor, used: Tensor) -> None:
        """What was fetched has changed."""

    def forget(self, kept: Tensor | None = None) -> None:
        """Nobody computes with it for a while; None: with anything here."""


def large(x: Tensor) -> bool:
    """Whether it is worth a trip."""
    return x.nbytes >= SMALL


def give_back() -> None:
    """Have freed memory go back to the system at once: glibc keeps blocks of up to 32 MB, and they
    add up to half of what a shelf saves."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # not musl's
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)  # type: ignore[union-attr]


class Host:
    """See the module."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # by address, nobody else's while it is here

    def put(self, x: Tensor) -> Tensor:
        """See ``Shelf.put``."""
        if x.data_ptr() in self._kept:
            return x
        kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=torch.cuda.is_available())
        self._kept[kept.data_ptr()] = kept
        return kept.copy_(x)

    def fetch(self, kept: Tensor, device: torch.device) -> Tensor:
        """See ``Shelf.fetch``."""
        return kept.to(device, copy=True, non_blocking=True)

    def store(self, kept: Tensor, used: Tensor) -> None:
        """See ``Shelf.store``."""
        kept.copy_(used)

    def forget(self, kept: Tensor | None = None) -> None:
        """See ``Shelf.forget``: the copy on the device goes by itself."""


class Disk:
    """See the module. ``folder``: where the files are."""

    def __init__(self, folder: Path | str) -> None:
        give_back()
        self.folder = Path(folder)
        self._files: list[mmap.mmap] = []
        self._used = 0  # bytes of the last file
        self._kept: dict[int, tuple[mmap.mmap, int, int]] = {}  # address: file, offset, bytes

    def put(self, x: Tensor) -> Tensor:
        """See ``Shelf.put``. Raises TrainingError where the disk has no room."""
        if x.data_ptr() in self._kept:
            return x
        file, start = self._room(x.nbytes)
        kept = torch.frombuffer(file, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
        self._kept[kept.data_ptr()] = file, start, x.nbytes
        kept.copy_(x)
        self.forget(kept)
        return kept

    def fetch(self, kept: Tensor, device: torch.device) -> Tensor:
        """See ``Shelf.fetch``: on a CPU nothing is copied."""
        return kept.to(device)

    def store(self, kept: Tensor, used: Tensor) -> None:
        """See ``Shelf.store``."""
        if used.data_ptr() != kept.data_ptr():
            kept.copy_(used)

    def forget(self, kept: Tensor | None = None) -> None:
        """See ``Shelf.forget``. The system writes the pages when it likes; none is lost."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows forgets by itself
            return
        if kept is None:
            for file in self._files:
                file.madvise(mmap.MADV_DONTNEED)
        else:
            file, start, nbytes = self._kept[kept.data_ptr()]
            file.madvise(mmap.MADV_DONTNEED, start, nbytes)

    def _room(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """A file, and where in it so many bytes are free."""
        needed = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if not self._files or self._used + needed > len(self._files[-1]):
            every = sum(map(len, self._files))
            self._files.append(self._opened(max(needed, FIRST, min(every, LARGEST))))
            self._used = 0
        start = self._used
        self._used += needed
        return self._files[-1], start

    def _opened(self, nbytes: int) -> mmap.mmap:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):  # or a full disk would be noticed too late
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                else:
                    file.truncate(nbytes)
                return mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise TrainingError(
                f"{self.folder}: {nbytes / 1e6:,.1f} MB more cannot be put away here: "
                f"{error.strerror}. Make room, or choose another directory (--offload-dir)."
            ) from None
