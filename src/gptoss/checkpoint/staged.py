"""All or nothing: a directory that appears whole under its name, or not at all.

It grows as ``.NAME.partial-PID`` beside the target, which nothing opens, and is renamed at the end.
What a killed process leaves is removed by the next one that writes to the same target.
"""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gptoss.errors import CheckpointError, GptOssError

try:
    import fcntl
except ImportError:  # Windows: what a killed run left there stays until it is removed by hand
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def staged(target: Path, needed: int) -> Iterator[Path]:
    """A hidden directory beside ``target`` that takes its name if all goes well, or is removed."""
    _check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        _check_room(target, needed)
        with _partial(target) as partial:
            yield partial
            sync(partial)
            os.rename(partial, target)
    except OSError as error:
        reason = "the disk is full" if error.errno in FULL else error.strerror or str(error)
        if error.filename is not None:  # perhaps a file of the source, or the caller's own
            reason = f"{error.filename}: {reason}"
        raise CheckpointError(
            f"{target}: could not be written: {reason}. Nothing was left behind."
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{target}: interrupted. Nothing was left behind.") from None
    with suppress(OSError):  # after a power cut the old name may be back; the files are safe
        sync(target.parent)


@contextmanager
def staged_file(target: Path) -> Iterator[IO[bytes]]:
    """The same of one file, which takes the place of what was there.

    Of a link it is what the link names; a device or a pipe is written to as it stands.

    Raises:
        GptOssError: it cannot be written; what was there stays.
    """
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                yield file
            return
        there = target.resolve()
        partial = there.with_name(f".{there.name}.partial-{os.getpid()}")
        _remove_stale(there)
        try:
            with partial.open("wb") as file, _locked(partial):
                yield file
            if there.exists():
                shutil.copymode(there, partial)
            os.replace(partial, there)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = "the disk is full" if error.errno in FULL else error.strerror or str(error)
        raise GptOssError(f"{target}: cannot be written: {reason}") from None


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """The hidden directory, locked for as long as this process works on it."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    with _locked(partial):
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # nothing is there after the renaming


def _check_free(target: Path) -> None:
    """The target may be an empty directory; anything more is somebody's."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        kind = "a directory that is not empty" if target.is_dir() else "a file"
        raise CheckpointError(f"{target}: already exists as {kind}; choose another name")


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed + (1 << 20):  # headers, config
        raise CheckpointError(
            f"{target}: needs {needed / 1e9:,.2f} GB, but the disk has {free / 1e9:,.2f} GB free; "
            "make room or choose another disk"
        )


def _remove_stale(target: Path) -> None:
    """Remove what killed runs left: what no living process holds locked."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.partial-[0-9]*"):
        with _locked(partial) as mine:
            if mine and partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            elif mine:
                with suppress(OSError):
                    partial.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether ``path`` is locked, meanwhile or until the process ends, by this process."""
    lock = _lock(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock ``path`` until the descriptor is closed or the process ends. None: cannot."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
