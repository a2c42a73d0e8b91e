"""A function's signature is a command line: annotations say what is taken, and how it is called.

    def run(model: Annotated[str, Argument(help="a path")], seed: Annotated[int, Option()] = 0)

Splitting words and nothing else: the libraries made for this take longer to import than the small
model takes to answer. A parameter whose type is a dataclass stands for all of its fields; what
their metadata say are an Option's own words.
"""

from __future__ import annotations

import getopt
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

EMPTY = inspect.Parameter.empty
KINDS = {int: "a whole number", float: "a number"}


class WrongCommandLine(Exception):
    """What was typed cannot be; the message is a sentence for whoever typed it."""


class Argument:
    """A word by its place. ``envvar`` names an environment variable that stands in for it."""

    def __init__(self, *, help: str = "", envvar: str | None = None) -> None:
        self.help, self.envvar = help, envvar


class Option(Argument):
    """A word by its name: ``--parameter-name``, or the given flags. A bool takes no value.

    ``default`` is what help says of a default that the command works out.
    """

    def __init__(
        self,
        *flags: str,
        help: str = "",
        envvar: str | None = None,
        default: str | None = None,
        min: float | None = None,
        max: float | None = None,
    ) -> None:
        super().__init__(help=help, envvar=envvar)
        self.flags, self.default, self.min, self.max = flags, default, min, max


@dataclass(frozen=True, slots=True)
class Word:
    """One parameter of a command."""

    group: str | None  # the parameter that takes it as a field, if it is a dataclass's
    name: str
    kind: type
    choices: tuple[str, ...]
    many: bool
    default: Any  # EMPTY: it must be given
    said: Any  # Argument or Option

    @property
    def flags(self) -> tuple[str, ...]:
        """What it is called by, nothing for a word by its place."""
        if not isinstance(self.said, Option):
            return ()
        return self.said.flags or (f"--{self.name.strip('_').replace('_', '-')}",)

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.flags[-1] if self.flags else self.name.upper()

    def value(self, text: str) -> Any:
        """Raises WrongCommandLine."""
        if self.choices and text not in self.choices:
            raise WrongCommandLine(f"{self.title}: {text!r} is none of {', '.join(self.choices)}")
        try:
            value = self.kind(text)
        except ValueError:
            raise WrongCommandLine(f"{self.title}: {text!r} is not {KINDS[self.kind]}") from None
        if isinstance(self.said, Option):
            if self.said.min is not None and not value >= self.said.min:
                raise WrongCommandLine(f"{self.title}: {text} is not {self.said.min} or more")
            if self.said.max is not None and not value <= self.said.max:
                raise WrongCommandLine(f"{self.title}: {text} is not {self.said.max} or less")
        return value


def words_of(run: Callable[..., Any], group: str | None = None) -> Iterator[Word]:
    """The parameters of a command, those of its dataclasses among them."""
    hints = get_type_hints(run, include_extras=True)
    notes = {one.name: one.metadata for one in fields(run)} if is_dataclass(run) else {}
    for name, parameter in inspect.signature(run).parameters.items():
        hint = hints[name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from words_of(hint, name)
            continue
        said: Argument = Option(**notes.get(name, {}))
        if get_origin(hint) is Annotated:
            hint, said = get_args(hint)
        if get_origin(hint) in (Union, UnionType):
            [hint] = [part for part in get_args(hint) if part is not NoneType]
        many = get_origin(hint) is list
        if many:
            [hint] = get_args(hint)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        kind = str if choices else hint
        yield Word(group, name, kind, choices, many, parameter.default, said)


def parse(run: Callable[..., Any], typed: Sequence[str]) -> dict[str, Any]:
    """What to call ``run`` with. Raises WrongCommandLine."""
    words = list(words_of(run))
    by_flag = {flag: word for word in words for flag in word.flags}
    short = [f[1] + ":" * (w.kind is not bool) for f, w in by_flag.items() if len(f) == 2]
    long = [f[2:] + "=" * (w.kind is not bool) for f, w in by_flag.items() if len(f) > 2]
    try:
        pairs, placed = getopt.gnu_getopt(list(typed), "".join(short), long)
    except getopt.GetoptError as error:
        raise WrongCommandLine(str(error)) from None
    found: dict[str, list[Any]] = {}
    for flag, text in pairs:
        word = by_flag[flag]
        found.setdefault(word.name, []).append(True if word.kind is bool else word.value(text))
    for word in words:
        if not word.flags and placed:
            taken, placed = (placed, []) if word.many else (placed[:1], placed[1:])
            found[word.name] = [word.value(text) for text in taken]
    if placed:
        raise WrongCommandLine(f"{placed[0]!r} is one word too many")
    return _grouped(run, {(w.group, w.name): _settled(w, found.get(w.name)) for w in words})


def _settled(word: Word, given: list[Any] | None) -> Any:
    """The last of what was given, else the environment's, else the default."""
    if given is not None:
        return given if word.many else given[-1]
    if word.said.envvar and (text := os.environ.get(word.said.envvar)):
        return [word.value(text)] if word.many else word.value(text)
    if word.default is EMPTY:
        raise WrongCommandLine(f"{word.title} is missing")
    return word.default


def _grouped(run: Callable[..., Any], values: dict[tuple[str | None, str], Any]) -> dict[str, Any]:
    """By parameter of ``run``: dataclasses are made of their fields."""
    grouped = {name: value for (group, name), value in values.items() if group is None}
    for group in {group for group, _ in values if group is not None}:
        inner = {name: value for (g, name), value in values.items() if g == group}
        try:
            grouped[group] = get_type_hints(run)[group](**inner)
        except ValueError as error:
            raise WrongCommandLine(str(error)) from None
    return grouped


def explained(name: str, run: Callable[..., Any]) -> str:
    """The help of a command."""
    words = list(words_of(run))
    placed = [w.title if w.default is EMPTY else f"[{w.title}]" for w in words if not w.flags]
    return "\n".join(
        [
            " ".join(["usage:", name, *placed, "[OPTIONS]"]),
            "",
            inspect.getdoc(run) or "",
            "",
            columns([(_left(w), _right(w)) for w in sorted(words, key=lambda w: bool(w.flags))]),
        ]
    )


def columns(rows: Sequence[tuple[str, str]]) -> str:
    """Two of them, as wide as the terminal allows."""
    import shutil
    import textwrap

    left = min(30, max(len(a) for a, _ in rows)) + 4
    width = max(left + 20, min(100, shutil.get_terminal_size().columns))
    lines = []
    for a, b in rows:
        first = f"  {a}".ljust(left) if len(a) < left - 3 else f"  {a}\n{' ' * left}"
        lines.append(first + textwrap.fill(b, width - left).replace("\n", "\n" + " " * left))
    return "\n".join(lines)


def _left(word: Word) -> str:
    value = "" if word.kind is bool else "|".join(word.choices) or word.name.strip("_").upper()
    return f"{', '.join(word.flags)} {value}".strip()


def _right(word: Word) -> str:
    shown = getattr(word.said, "default", None)
    if shown is None and word.default not in (EMPTY, None, False):
        shown = word.default
    notes = ["required"] if word.default is EMPTY else [f"default: {shown}"] if shown else []
    notes += [f"env: {word.said.envvar}"] if word.said.envvar else []
    return f"{word.said.help} [{'; '.join(notes)}]" if notes else str(word.said.help)
