"""What a person sees: answers on stdout, thoughts and progress on stderr, colours on terminals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from gptoss.errors import GptOssError

if TYPE_CHECKING:
    from rich.console import Console

    from gptoss.text.parser import Delta

STYLES = {"analysis": "dim", "commentary": "cyan", "note": "yellow"}
RESULT = 1500  # characters of a tool's answer
# What a model must not send to a terminal: it could move the cursor or retitle the window.
_CONTROLS = {i: "\ufffd" for i in [*range(32), *range(127, 160)] if chr(i) not in "\n\t"}


def document(found: Any) -> str:
    """As JSON, which has no infinity and no NaN: null."""
    return json.dumps(_finite(found), allow_nan=False)


def _finite(x: Any) -> Any:
    match x:
        case dict():
            return {name: _finite(value) for name, value in x.items()}
        case list():
            return [_finite(value) for value in x]
        case float() if not math.isfinite(x):
            return None
    return x


class Screen:
    """Deltas as they come: the final answer to stdout, everything else, labelled, to stderr."""

    def __init__(self) -> None:
        self._section: int | None = None  # the message being shown
        self._at: TextIO | None = None  # where its line is still open
        self._console: Console | None = None
        if sys.stderr.isatty():  # only then does rich have anything to do
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    def show(self, delta: Delta) -> None:
        """A piece of a message; calls of tools look like thoughts."""
        kind = "analysis" if delta.recipient else delta.channel
        if delta.message_index != self._section:
            self.end()
            self._section = delta.message_index
            if delta.channel != "final":
                to = f" to={delta.recipient}" if delta.recipient else ""
                self._aside(f"[{delta.channel or delta.role}{to}] ", kind)
        if delta.channel == "final":
            self.say(delta.text)
        else:
            self._aside(delta.text, kind)

    def result(self, name: str, text: str) -> None:
        """What a tool answered; of much, the beginning."""
        self.end()
        rest = f"\n... ({len(text) - RESULT} characters more)" if len(text) > RESULT else ""
        self._aside(f"[{name}] {text[:RESULT].rstrip()}{rest}", "analysis")
        self.end()

    def say(self, text: str) -> None:
        """Part of the answer."""
        print(shown(text, sys.stdout), end="", flush=True)
        self._at = sys.stdout

    def note(self, sentence: str) -> None:
        """Something about the answer."""
        self.end()
        self._aside(f"({sentence})", "note")
        self.end()

    def end(self) -> None:
        """Finish the line and the section."""
        at, self._at, self._section = self._at, None, None
        if at is not None:
            print(file=at, flush=True)

    def _aside(self, text: str, kind: str | None) -> None:
        self._at = sys.stderr
        if self._console is None:
            print(text, end="", file=sys.stderr, flush=True)
        else:
            style = STYLES.get(kind or "", "")
            self._console.print(shown(text, sys.stderr), style=style, end="", markup=False)


def shown(text: str, stream: TextIO) -> str:
    """``text``, without control characters if it goes to a terminal."""
    return text.translate(_CONTROLS) if stream.isatty() else text


def decoded(raw: bytes, origin: str) -> str:
    """Bytes as text. Raises GptOssError if they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GptOssError(
            f"{origin}: not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}. Convert "
            "it, for example with iconv."
        ) from None


def typed(text: str, origin: str) -> str:
    """Text of the command line or the keyboard. Raises GptOssError if it was not UTF-8."""
    return decoded(text.encode("utf-8", "surrogateescape"), origin)


@contextmanager
def bar(title: str, *, files: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with rate and remaining time, fed (done, total); None if nobody looks.

    ``files``: what is counted are bytes.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    counts = [DownloadColumn(), Speed()] if files else [TextColumn("{task.completed}/{task.total}")]
    columns = [TextColumn(title), BarColumn(), *counts, TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield report
