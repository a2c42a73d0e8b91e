"""``gptoss diff``: where two traces part, or a trace and what a model makes of its tokens now.

gptoss generate -p "What is 17 + 25?" --trace a.npz -b native
gptoss generate -p "What is 17 + 25?" --trace b.npz -b torch
gptoss diff a.npz b.npz
gptoss diff a.npz --edit 17=262 --out c.npz
gptoss diff served.traces --list
gptoss diff served.traces#req_0a1b a.npz
gptoss diff first.traces second.traces
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gptoss.cli import options
from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.candidates import Running, opened_model
from gptoss.cli.endings import usage
from gptoss.cli.terminal import document
from gptoss.cli.tracing import replaceable
from gptoss.errors import GptOssError

if TYPE_CHECKING:
    from gptoss.verify.diff import Parting
    from gptoss.verify.trace import TraceFile


def run(
    first: Annotated[str, Argument(help="a trace; FILE#ID, if the file holds many")],
    second: Annotated[
        str | None,
        Argument(help="another; without it, the first's tokens are read anew"),
    ] = None,
    list_: Annotated[bool, Option("--list", help="only say which traces a file holds")] = False,
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
    """The first token, layer and operation at which two runs differ. Exit status 1: they do.

    Of two files that hold many traces, the first of those with the same name that differs.
    """
    from gptoss.verify.diff import diff
    from gptoss.verify.traces import is_traces, open_trace

    if second is not None and (on is not None or edit or out is not None):
        raise WrongCommandLine("--on, --edit and --out are for one trace, read anew")
    if list_ and (second is not None or on is not None or edit or out is not None):
        raise WrongCommandLine("--list takes one file, and nothing is compared")
    if out is not None:
        replaceable(out, "--out")
    if list_:
        return listed(first, json_)
    if second is not None and all(Path(x).is_file() and is_traces(x) for x in (first, second)):
        name, found = first_parting(first, second, tolerance)
    else:
        a = open_trace(first)
        b = open_trace(second) if second is not None else anew(a, on, edit or [], running)
        if out is not None:
            b.save(out)
        with usage():
            name, found = None, diff(a, b, tolerance)
    if json_:
        print(document({"trace": name} | asdict(found)))
    else:
        print(described(found) if name is None else f"{name}: {described(found)}")
    if not found.same:
        sys.exit(1)


def listed(path: str, as_json: bool) -> None:
    """A line for each trace: its name, how many tokens, of which how many were given."""
    from gptoss.verify.traces import Traces, is_traces

    if not is_traces(path):
        raise GptOssError(f"{path}: is no file of many traces, as serve and train write them")
    traces = Traces(path)
    for name in traces.names:
        tokens, prompt = traces.size(name)
        given = "" if prompt is None else f", {min(prompt, tokens)} of them given"
        said = {"trace": name, "tokens": tokens, "prompt": prompt}
        print(json.dumps(said) if as_json else f"{name}: {tokens} tokens{given}")


def first_parting(first: str, second: str, tolerance: float) -> tuple[str, Parting]:
    """Of the traces that both files have, in the first's order: the first that differs, or the last
    if none does.
    """
    from gptoss.verify.diff import diff
    from gptoss.verify.traces import Traces

    ours, theirs = Traces(first), Traces(second)
    both = [name for name in ours.names if name in set(theirs.names)]
    if not both:
        raise GptOssError(
            f"{first} and {second} have no trace of the same name; say which: {first}#ID, of "
            f"{ours.listed()}, and {second}#ID, of {theirs.listed()}"
        )
    for name in both:
        with usage():
            found = diff(ours.load(name), theirs.load(name), tolerance)
        if not found.same:
            return name, found
    return f"{len(both)} traces, the last {both[-1]}", found


def anew(a: TraceFile, on: str | None, edits: list[str], running: Running) -> TraceFile:
    """The same tokens but for the edits, read by a model."""
    from gptoss.verify.record import Recorder, replay

    if "targets" in a.arrays:
        raise WrongCommandLine("a batch that was trained on is not read anew; give a second trace")
    tokens = a.tokens
    for said in edits:
        found = re.fullmatch(r"(\d{1,9})=(\d{1,9})", said)
        if found is None or int(found[1]) >= len(tokens):
            raise WrongCommandLine(f"--edit: {said!r} is not AT=TOKEN, AT below {len(tokens)}")
        tokens[int(found[1])] = int(found[2])
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
