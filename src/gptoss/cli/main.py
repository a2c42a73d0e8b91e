"""``gptoss COMMAND``: dispatch, and nothing else.

Exit status: 0 fine, 1 the world is wrong (files, memory, network), 2 the command line is wrong,
130 interrupted, 141 nobody reads our output any more.
"""

import sys
from collections.abc import Callable
from typing import Any

from gptoss import __version__
from gptoss.cli.arguments import WrongCommandLine, columns, explained, parse
from gptoss.cli.endings import guarded

COMMANDS = (
    "generate",
    "chat",
    "inspect",
    "convert",
    "synthesize",
    "models",
    "bench",
    "serve",
    "train",
    "verify",
    "diff",
    "look",
)


def command(name: str) -> Callable[..., None]:
    """What runs it. Only its own file is imported."""
    match name:
        case "generate":
            from gptoss.cli import generate

            return generate.run
        case "chat":
            from gptoss.cli import chat

            return chat.run
        case "inspect":
            from gptoss.cli import inspect

            return inspect.run
        case "convert":
            from gptoss.cli import convert

            return convert.run
        case "synthesize":
            from gptoss.cli import synthesize

            return synthesize.run
        case "models":
            from gptoss.cli import models

            return models.run
        case "bench":
            from gptoss.cli import bench

            return bench.run
        case "serve":
            from gptoss.cli import serve

            return serve.run
        case "train":
            from gptoss.cli import train

            return train.run
        case "verify":
            from gptoss.cli import verify

            return verify.run
        case "look":
            from gptoss.cli import look

            return look.run
        case "diff":
            from gptoss.cli import diff

            return diff.run
    near = [known for known in COMMANDS if known.startswith(name[:1])]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise WrongCommandLine(f"there is no command {name!r}{hint}")


def main() -> None:
    """Run the command that ``sys.argv`` names; ends in SystemExit."""
    guarded(_main)(sys.argv[1:])
    sys.exit(0)


def _main(typed: list[str]) -> None:
    title = "gptoss"
    try:
        match typed:
            case []:
                print(_about(), file=sys.stderr)
                sys.exit(2)
            case ["-h" | "--help", *_]:
                print(_about())
            case ["--version", *_]:
                print(f"gptoss {__version__}")
            case [name, *words]:
                run = command(name)
                title = f"gptoss {name}"
                if name == "train" and words and not words[0].startswith("-"):
                    from gptoss.cli import train

                    run, title, words = train.recipe(words[0]), f"{title} {words[0]}", words[1:]
                if _asks_for_help(words):
                    print(explained(title, run))
                else:
                    run(**parse(run, words))
    except WrongCommandLine as error:
        print(f"{title}: {error} (see `{title} --help`)", file=sys.stderr)
        sys.exit(2)


def _asks_for_help(words: list[str]) -> bool:
    said = words[: words.index("--")] if "--" in words else words
    return "-h" in said or "--help" in said


def _about() -> str:
    docs: list[tuple[str, Any]] = [(name, command(name).__doc__) for name in COMMANDS]
    rows = [(name, doc.splitlines()[0]) for name, doc in docs]
    return "\n".join(
        [
            "usage: gptoss COMMAND ...; gptoss COMMAND --help; gptoss --version",
            "",
            "gpt-oss: run it, look into it, convert it.",
            "",
            columns(rows),
        ]
    )
