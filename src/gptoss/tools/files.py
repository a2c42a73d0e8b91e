"""Files of one folder and nothing beside it, changed all at once or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gptoss.tools.call import ToolError

MOST_BYTES = 4 << 20  # of one file


@dataclass(frozen=True, slots=True)
class Change:
    """What a file becomes."""

    text: str | None  # None: it is deleted
    like: PurePosixPath | None = None  # whose permissions it gets


class Root:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve(strict=True)

    def path(self, said: str) -> PurePosixPath:
        """A file in the folder by the name somebody gave it. Raises ToolError."""
        path = PurePosixPath(said)
        if not said or "\0" in said or path.is_absolute() or ".." in path.parts or not path.parts:
            raise ToolError(f"{said[:200]!r} is no path inside the folder")
        if ".git" in map(str.lower, path.parts):  # hooks and settings there are run as commands
            raise ToolError(f"{said[:200]!r}: what git keeps is not to be changed")
        full = self._folder / path
        try:
            full.exists()  # not if a name in it is too long, or cannot be written as UTF-8
            if full.resolve() != full:
                raise ToolError(f"{path}: a link is on the way, and links are not followed")
        except (OSError, RuntimeError, UnicodeEncodeError):
            raise ToolError(f"{str(path)[:200]!r} is no path that can be") from None
        return path

    def read(self, path: PurePosixPath) -> str:
        """Its text. Raises ToolError."""
        full = self._folder / path
        if not full.is_file():
            raise ToolError(f"{path}: there is no such file")
        try:
            if full.stat().st_size > MOST_BYTES:
                raise ToolError(f"{path}: larger than {MOST_BYTES >> 20} MiB")
            return full.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ToolError(f"{path}: not text in UTF-8") from None
        except OSError as error:
            raise ToolError(f"{path}: {error.strerror}") from None

    def must_be_absent(self, path: PurePosixPath) -> None:
        """Raises ToolError."""
        if (self._folder / path).exists():
            raise ToolError(f"{path}: it exists already; update it, or delete it first")

    def commit(self, changes: Mapping[PurePosixPath, Change]) -> None:
        """All of them. Raises ToolError, and then none has happened.

        New texts and copies of the old are written first; what can fail after that is undone.
        """
        with ExitStack() as undo:
            try:
                staged = {self._folder / p: self._stage(p, c, undo) for p, c in changes.items()}
                spare = {full: _copy(full, undo) for full in staged}
                for full, new in staged.items():
                    _put(full, new, spare[full], undo)
            except (OSError, UnicodeEncodeError) as error:
                why = getattr(error, "strerror", None) or "a text cannot be written as UTF-8"
                raise ToolError(f"nothing was changed: {why}") from None
            undo.pop_all()
        for old in filter(None, spare.values()):
            with suppress(OSError):
                old.unlink()

    def _stage(self, path: PurePosixPath, change: Change, undo: ExitStack) -> Path | None:
        """The new text beside its place; None if there shall be no file."""
        if change.text is None:
            return None
        full, like = self._folder / path, self._folder / (change.like or path)
        for parent in reversed([p for p in full.parents if not p.exists()]):
            parent.mkdir()
            undo.callback(_quietly, parent.rmdir)
        new = _beside(full, undo)
        new.write_bytes(change.text.encode())
        new.chmod(like.stat().st_mode & 0o777 if like.exists() else 0o644)
        return new


def _beside(full: Path, undo: ExitStack) -> Path:
    """An empty file of another name."""
    handle, name = tempfile.mkstemp(dir=full.parent, prefix=".patch-")
    os.close(handle)
    undo.callback(_quietly, Path(name).unlink)
    return Path(name)


def _copy(full: Path, undo: ExitStack) -> Path | None:
    if not full.exists():
        return None
    copied = _beside(full, undo)
    shutil.copy2(full, copied)
    return copied


def _put(full: Path, new: Path | None, old: Path | None, undo: ExitStack) -> None:
    if new is None:
        full.unlink()
    else:
        os.replace(new, full)
    if old is None:
        undo.callback(_quietly, full.unlink)
    else:
        undo.callback(_quietly, lambda: os.replace(old, full))


def _quietly(act: Callable[[], object]) -> None:
    with suppress(OSError):
        act()
