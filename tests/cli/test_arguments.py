"""Command lines, read from signatures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from gptoss.cli.arguments import Argument, Option, WrongCommandLine, explained, parse


@dataclass(frozen=True, kw_only=True)
class Paint:
    colour: Annotated[Literal["red", "blue"], Option("-c", "--colour")] = "red"
    layers: Annotated[int | None, Option(min=1, max=9, help="how often", default="enough")] = None


def draw(
    target: Annotated[Path, Argument(help="where to")],
    size: Annotated[float, Argument(envvar="GPTOSS_TEST_SIZE")] = 1.0,
    dry_: Annotated[bool, Option("-d", "--dry", help="do not")] = False,
    tags: Annotated[list[str], Option("-g", "--tag")] = [],  # noqa: B006
    *,
    paint: Paint,
) -> None:
    """Draw it."""


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("a", {}),
        ("a 2.5 -d", {"size": 2.5, "dry_": True}),
        ("-dcblue a", {"dry_": True, "paint": Paint(colour="blue")}),
        ("a --layers 3 --colour=blue", {"paint": Paint(colour="blue", layers=3)}),
        ("a --layers 3 --layers 4", {"paint": Paint(layers=4)}),
        ("a -g x --tag -5+3", {"tags": ["x", "-5+3"]}),
        ("--dry -- a", {"dry_": True}),
    ],
)
def test_what_is_typed_becomes_what_is_called(typed, expected):
    defaults = {"target": Path("a"), "size": 1.0, "dry_": False, "tags": [], "paint": Paint()}
    assert parse(draw, typed.split()) == defaults | expected


@pytest.mark.parametrize(
    "typed, said",
    [
        ("", "TARGET is missing"),
        ("a b", "SIZE: 'b' is not a number"),
        ("a 1 c", "'c' is one word too many"),
        ("a --colour green", "--colour: 'green' is none of red, blue"),
        ("a --layers 0", "--layers: 0 is not 1 or more"),
        ("a --layers 10", "--layers: 10 is not 9 or less"),
        ("a --layers 1.5", "--layers: '1.5' is not a whole number"),
        ("a --layers", "--layers requires argument"),
        ("a --nonsense", "--nonsense not recognized"),
        ("a -x", "-x not recognized"),
    ],
)
def test_what_cannot_be_is_a_sentence(typed, said):
    with pytest.raises(WrongCommandLine, match=f"^(option )?{said}$"):
        parse(draw, typed.split())


def test_the_environment_stands_in_for_what_is_not_typed(monkeypatch):
    monkeypatch.setenv("GPTOSS_TEST_SIZE", "7")
    assert parse(draw, ["a"])["size"] == 7.0 and parse(draw, ["a", "2"])["size"] == 2.0
    monkeypatch.setenv("GPTOSS_TEST_SIZE", "large")
    with pytest.raises(WrongCommandLine, match="SIZE: 'large'"):
        parse(draw, ["a"])
    monkeypatch.setenv("GPTOSS_TEST_SIZE", "")
    assert parse(draw, ["a"])["size"] == 1.0


@pytest.mark.parametrize("columns", ["30", "80", "500"])
def test_help_says_everything_in_the_width_there_is(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = explained("gptoss draw", draw)
    for part in (
        "usage: gptoss draw TARGET [SIZE] [OPTIONS]",
        "Draw it.",
        "where to",
        "[required]",
        "env: GPTOSS_TEST_SIZE",
        "-c, --colour red|blue",
        "default: enough",
    ):
        assert part in " ".join(text.split()), text
    assert max(map(len, text.splitlines())) <= max(100, int(columns) - 400)
