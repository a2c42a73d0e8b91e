"""Many traces in one file that is only ever added to: a server's requests, a training's steps.

    gptoss-traces-1\n   once, in front
    [4 bytes]           length of a header, little-endian
    [8 bytes]           length of a body
    header              JSON: key, id, past, end, prompt, after
    body                a trace as ``trace.py`` has it, of some tokens

Parts with one ``key`` are one trace; each has the tokens from ``past`` to ``end``, and tokens that
come again replace what was. A trace may go on from another's first tokens: ``after`` is [key, how
many]. What a killed process left half-written is not looked at, and the next to write there cuts
it off. The ``id`` is who it is for people; of several with one id, the second is ID.1, and so on.
"""

import errno
import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import IO, Any

from gptoss.errors import GptOssError
from gptoss.verify.trace import Part, TraceFile, joined

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAGIC = b"gptoss-traces-1\n"
SIZES = struct.Struct("<IQ")
SHOWN = 8  # ids that an error lists
MOST = 10_000_000_000  # bytes of a file, unless another limit is given


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a part is."""

    head: dict[str, Any]
    start: int  # of the body
    size: int


class Writer:
    """Adds parts to a file of ``most`` bytes. Each is there, whole, when ``add`` returns.

    A new file is its owner's alone: it holds what people said.

    Raises:
        GptOssError: the file is another kind, or another process writes there.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path | str, most: int = MOST) -> None:
        self.path, self.most, self.size = Path(path), most, 0
        self._file = open(self.path, "ab", buffering=0, opener=_private)  # noqa: SIM115
        try:
            if not _locked(self._file.fileno()):
                raise GptOssError(f"{path}: another process is writing there")
            if self.path.stat().st_size:
                self.size = _end(self.path)
                self._file.truncate(self.size)
            else:
                self._put(MAGIC)
        except BaseException:
            self._file.close()
            raise

    def add(
        self,
        trace: TraceFile,
        *,
        key: str,
        id: str,
        past: int = 0,
        after: tuple[str, int] | None = None,
    ) -> None:
        """One part.

        Raises:
            OSError: it cannot be written, or there would be too much; the file is as it was.
        """
        body = BytesIO()
        trace.write(body)
        end, prompt = past + len(trace.tokens), trace.about.get("prompt")
        said = {"key": key, "id": id, "past": past, "end": end, "prompt": prompt, "after": after}
        head = json.dumps(said).encode()
        record = SIZES.pack(len(head), body.tell()) + head + body.getvalue()
        if self.size + len(record) > self.most:
            raise OSError(errno.EFBIG, f"it may take {self.most} bytes")
        self._put(record)

    def close(self) -> None:
        """Nothing follows."""
        self._file.close()

    def _put(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):  # what is torn is cut off by who writes next
                self._file.truncate(self.size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.size += len(data)


class Traces:
    """A file of many traces, of which only the headers have been read.

    Raises:
        GptOssError: it is another kind of file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._pieces: dict[str, list[Piece]] = {}
        with open(path, "rb") as file:
            for piece in _pieces(file, str(path)):
                self._pieces.setdefault(piece.head["key"], []).append(piece)
        self.keys: dict[str, str] = {}  # by the name that a trace is called
        seen = Counter[str]()
        for key, pieces in self._pieces.items():
            id = str(pieces[0].head["id"])
            free = (name for name in _names(id, seen[id]) if name not in self.keys)
            self.keys[next(free)] = key
            seen[id] += 1

    @property
    def names(self) -> list[str]:
        """In the order in which they began."""
        return list(self.keys)

    def load(self, name: str) -> TraceFile:
        """One trace, whole.

        Raises:
            GptOssError: there is none of this name, or a part of it is missing or damaged.
        """
        if name not in self.keys:
            raise GptOssError(f"{self.path}: holds no trace {name!r}, only {self.listed()}")
        return self._load(self.keys[name])

    def size(self, name: str) -> tuple[int, int | None]:
        """How many tokens a trace has, and of those the prompt; None: it is no answer."""
        last = self._pieces[self.keys[name]][-1].head
        return int(last["end"]), last["prompt"]

    def listed(self) -> str:
        """The names, for a sentence."""
        more = f", ... ({len(self.keys)} in all)" if len(self.keys) > SHOWN else ""
        return (", ".join(self.names[:SHOWN]) or "none") + more

    def _load(self, key: str) -> TraceFile:
        pieces, parts, about = self._pieces.get(key, []), list[Part](), dict[str, Any]()
        with open(self.path, "rb") as file:
            for piece in pieces:
                file.seek(piece.start)
                found = TraceFile.read(BytesIO(file.read(piece.size)), f"{self.path}#{key}")
                about = found.about
                if piece.head["after"] and not parts:
                    other, count = piece.head["after"]
                    before = self._load(other).arrays
                    parts.append((0, {name: x[:count] for name, x in before.items()}))
                parts.append((piece.head["past"], found.arrays))
        try:
            return TraceFile(about, joined(parts))
        except (ValueError, KeyError, TypeError) as error:
            raise GptOssError(f"{self.path}#{key}: is not whole: {error}") from None


def is_traces(path: Path | str) -> bool:
    """Whether a file holds many, by its first bytes. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_trace(where: str) -> TraceFile:
    """FILE, or FILE#ID where it holds many.

    Raises:
        GptOssError: there is no such trace.
    """
    path, name = _split(where)
    if not is_traces(path):
        if name:
            raise GptOssError(f"{path}: holds one trace alone; leave #{name} out")
        return TraceFile.load(path)
    traces = Traces(path)
    if not name and len(traces.names) == 1:
        [name] = traces.names
    if not traces.names:
        raise GptOssError(f"{path}: holds no trace yet")
    if not name:
        raise GptOssError(
            f"{path}: holds {len(traces.names)} traces; say {path}#ID, of {traces.listed()}"
        )
    return traces.load(name)


def _split(where: str) -> tuple[str, str]:
    """FILE and ID; either may have a # in it."""
    ends = [len(where), *(i for i, sign in enumerate(where) if sign == "#")]
    end = next((i for i in ends if os.path.exists(where[:i])), len(where))
    return where[:end], where[end + 1 :]


def _names(id: str, first: int) -> Iterator[str]:
    """What the next trace with this id may be called."""
    return (f"{id}.{i}" if i else id for i in count(first))


def _locked(descriptor: int) -> bool:
    """Whether this process alone writes there, until it closes the file or ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _pieces(file: IO[bytes], origin: str) -> list[Piece]:
    """Those that are whole, in order."""
    if file.read(len(MAGIC)) != MAGIC:
        raise GptOssError(f"{origin}: is no file of traces that gptoss has written")
    size, found = os.fstat(file.fileno()).st_size, list[Piece]()
    while len(sizes := file.read(SIZES.size)) == SIZES.size:
        head, body = SIZES.unpack(sizes)
        start = file.tell() + head
        if start + body > size:
            break
        try:
            found.append(Piece(_head(file.read(head)), start, body))
        except ValueError:
            raise GptOssError(f"{origin}: is damaged at byte {start - head}") from None
        file.seek(start + body)
    return found


def _head(raw: bytes) -> dict[str, Any]:
    """A header. Raises ValueError for anything else."""
    match head := json.loads(raw):
        case {"key": str(), "id": str(), "past": int(), "end": int(), "prompt": _, "after": _}:
            return dict(head)
    raise ValueError("no header")


def _end(path: Path) -> int:
    """Where the last whole part ends."""
    with open(path, "rb") as file:
        pieces = _pieces(file, str(path))
    return pieces[-1].start + pieces[-1].size if pieces else len(MAGIC)
