"""Bytes off the disk, with suspicion: regular files, sizes known first, JSON without surprises.

Nothing here knows what a tensor is. Everything that can be wrong with a file as a file is a
``CheckpointError`` that names it.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from gptoss.errors import CheckpointError

LARGEST_JSON = 16 << 20  # bytes of a config or an index; the largest real one has 60 thousand
DIGITS = 19  # of a whole number; beyond lie only numbers that count nothing on disk
POINTER = b"version https://git-lfs"


def open_file(path: Path) -> tuple[BinaryIO, int]:
    """A regular file opened for reading, and its size. Symbolic links are followed.

    Never waits: a pipe or a device is refused, not read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise CheckpointError(f"{path}: expected a file, found {kind}")
    return os.fdopen(descriptor, "rb"), status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file."""
    file, size = open_file(path)
    with file:
        if size > LARGEST_JSON:
            raise CheckpointError(
                f"{path}: {size} bytes are too many; this file has at most {LARGEST_JSON}"
            )
        raw = file.read(size)
    if raw.startswith(POINTER):
        raise CheckpointError(f"{path}: {POINTER_ADVICE}")
    return parse_json(raw, str(path))


def parse_json(raw: bytes, origin: str) -> dict[str, Any]:
    """One JSON object, refusing what a careless parser lets through: a name that stands twice,
    NaN, half a surrogate pair, numbers of any length, nesting of any depth.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_once,
            parse_int=_whole,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise CheckpointError(f"{origin}: JSON nested too deeply to be a checkpoint's") from None
    except ValueError as error:  # of JSON, of UTF-8, or of the three below
        raise CheckpointError(
            f"{origin}: not valid JSON ({error}). The file is damaged or something else; "
            "fetch it again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin}: expected a JSON object, found {shown(value)}")
    return value


def shown(value: object) -> str:
    """``value`` for a message: quoted, printable, of bounded length."""
    text = repr(value[:81]) if isinstance(value, (str, list)) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def some(names: list[str]) -> str:
    """A handful of names for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more


POINTER_ADVICE = (
    "this is a git-lfs pointer, not the file itself. Run `git lfs pull` in the checkpoint's "
    "repository, or download the file again."
)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} stands twice")
        name.encode()  # half a surrogate pair is no text, though JSON can spell it
        if isinstance(value, str):
            value.encode()
        found[name] = value
    return found


def _whole(text: str) -> int:
    if len(text) > DIGITS or text == "-0":
        raise ValueError(f"{text[:DIGITS]}... is no number of a checkpoint")
    return int(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")
