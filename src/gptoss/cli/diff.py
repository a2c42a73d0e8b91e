"""``gptoss diff``: where two traces part, or a trace and what a model makes of its tokens now.

gptoss generate -p "What is 17 + 25?" --trace a.npz -b native
gptoss generate -p "What is 17 + 25?" --trace b.npz -b torch
gptoss diff a.npz b.npz
gptoss diff a.npz --edit 17=262 --out c.npz
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gptoss.cli import options
from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.verify import Running, opened_model

if TYPE_CHECKING:
    from gptoss.verify.trace import Parting, TraceFile


def run(
    first: Annotated[Path, Argument(help="a trace")],
    second: Annotated[
        Path | None, Argument(help="another; without it, the first's tokens are read anew")
    ] = None,
    on: Annotated[str | None, Option(help="read by this model", default="the trace's")] = None,
    edit: Annotated[
        list[str] | None, Option("--edit", help="AT=TOKEN: with another token there, by their ids")
    ] = None,
    out: Annotated[Path | None, Option(help="keep the trace of that here")] = None,
    tolerance: Annotated[
        float, Option(min=0.0, help="of a difference, relative to the value")
    ] = 1e-3,
    json_: options.Json = False,
    *,
    running: Running,
) -> None:
    """The first token, layer and operation at which two runs differ. Exit status 1: they do."""
    from gptoss.verify.trace import TraceFile, diff

    if second is not None and (on is not None or edit or out is not None):
        raise WrongCommandLine("--on, --edit and --out are for one trace, read anew")
    a = TraceFile.load(first)
    b = TraceFile.load(second) if second is not None else anew(a, on, edit or [], running)
    if out is not None:
        b.save(out)
    with usage():
        found = diff(a, b, tolerance)
    print(json.dumps(asdict(found)) if json_ else described(found))
    if found.token is not None or found.tokens is not None:
        sys.exit(1)


def anew(a: TraceFile, on: str | None, edits: list[str], running: Running) -> TraceFile:
    """The same tokens but for the edits, read by a model."""
    from gptoss.verify.trace import Recorder, replay

    tokens = a.tokens
    for said in edits:
        at, _, token = said.partition("=")
        if not (at.isdecimal() and token.isdecimal() and int(at) < len(tokens)):
            raise WrongCommandLine(f"--edit: {said!r} is not AT=TOKEN, AT below {len(tokens)}")
        tokens[int(at)] = int(token)
    model = on or str(a.about.get("model", "nano"))
    with opened_model(model) as opened:
        with usage():
            candidate = running.candidate(opened, None)
        recorder = Recorder(candidate.open(), opened.read)
        with usage():
            replay(recorder, tokens)
    return recorder.trace(model=model, backend=candidate.backend)


def described(found: Parting) -> str:
    """For people."""
    lines = [f"{found.length} tokens compared"]
    if found.tokens is not None:
        lines.append(f"token {found.tokens} is another")
    if found.token is None:
        lines.append("the values are the same")
    else:
        lines.append(f"values part at token {found.token}, {found.point}, by {found.size:.1e}")
    if found.likeliest is not None:
        lines.append(f"behind token {found.likeliest} another token is the likeliest")
    return "\n".join(lines)
