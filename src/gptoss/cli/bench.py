"""``gptoss bench``: how fast a model runs here, and what share of the machine that is.

gptoss bench decode
gptoss bench decode checkpoints/20b --precision exact --rows 4 --context 4096
gptoss bench prefill checkpoints/20b --tokens 2048 --json | jq .tokens_per_second
gptoss bench load openai/gpt-oss-20b
gptoss bench serve http://127.0.0.1:8000/v1 --rate 4 --requests 200 --answers 16:256
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from gptoss.cli import options
from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.serving import Serving
from gptoss.cli.terminal import bar

if TYPE_CHECKING:
    from gptoss.bench.report import Report
    from gptoss.bench.subject import Loading

# What each measures, by default.
SIZES = {
    "decode": {"rows": 1, "context": 128, "steps": 32},
    "prefill": {"tokens": 512},
    "load": {},
    "serve": {},
}


@dataclass(frozen=True, kw_only=True)
class Running(options.Loading):
    """How the model is run; its room follows from what is measured."""

    context: Annotated[
        int | None, Option(min=1, help="decode: tokens in each row before", default="128")
    ] = None

    def arguments(self) -> Loading:
        """The same for the library."""
        return {
            "backend": self.backend,
            "precision": self.precision,
            "threads": self.threads,
            "kv": self.kv,
            "memory": options.size(self.memory),
            "dtype": self.dtype,
            "device": self.device,
            "force": self.force,
            "announce": None if self.quiet else announce,
        }


def run(
    what: Annotated[
        Literal["decode", "prefill", "load", "serve"], Argument(help="what to measure")
    ],
    model: Annotated[
        str,
        Argument(
            help="\"nano\", a checkpoint's path, or a Hugging Face id; serve: a server's URL",
            envvar="GPTOSS_MODEL",
        ),
    ] = "nano",
    rows: Annotated[int | None, Option(min=1, help="decode: rows at once", default="1")] = None,
    steps: Annotated[
        int | None, Option(min=1, help="decode: tokens drawn in each row", default="32")
    ] = None,
    tokens: Annotated[
        int | None, Option(min=1, help="prefill: length of the prompt", default="512")
    ] = None,
    rounds: Annotated[int, Option(min=1, help="whose median counts")] = 3,
    json_: Annotated[bool, Option("--json", help="print the JSON line only")] = False,
    *,
    running: Running,
    serving: Serving,
) -> None:
    """Tokens a second, bytes and operations beside what the machine can do, peak memory.

    Of a server, which may be anybody's: how long its users wait. The last line of the output is one
    JSON object.
    """
    sizes = {"rows": rows, "context": running.context, "steps": steps, "tokens": tokens}
    asked = {name: value for name, value in sizes.items() if value is not None}
    if foreign := [name for name in asked if name not in SIZES[what]]:
        raise WrongCommandLine(f"--{foreign[0]} is not for {what}")
    if what == "serve":
        from gptoss.bench import latency

        facts, table = serving.measure(model), latency.table
    elif given := serving.given():
        raise WrongCommandLine(f"{given[0]} is only for serve")
    else:
        from gptoss.bench import report

        facts = measure(what, model, SIZES[what] | asked, rounds, running.arguments()).to_json()
        table = report.table
    if not json_:
        print(table(facts))
    print(json.dumps(facts))


def measure(what: str, model: str, sizes: dict[str, int], rounds: int, how: Loading) -> Report:
    """Load and measure, with a bar for each where somebody looks."""
    from gptoss.bench.decode import decode
    from gptoss.bench.load import load
    from gptoss.bench.prefill import prefill
    from gptoss.bench.subject import Subject

    if what == "load":
        with usage(), bar("measuring") as watch:
            return load(model, rounds=rounds, watch=watch, **how)
    rows, context, length = (sizes.get(name, 1) for name in ("rows", "context", "tokens"))
    row = context + sizes["steps"] if what == "decode" else length
    with usage(), bar("loading") as progress:
        subject = Subject(model, rows, row, progress=progress, **how)
    with bar("measuring") as watch:
        if what == "decode":
            return decode(
                subject, context=context, steps=sizes["steps"], rounds=rounds, watch=watch
            )
        return prefill(subject, tokens=length, rounds=rounds, watch=watch)


def announce(plan: object) -> None:
    """On stderr, before the model is loaded."""
    print(plan, file=sys.stderr, flush=True)
