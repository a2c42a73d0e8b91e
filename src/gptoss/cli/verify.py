"""``gptoss verify``: whether a backend is right, or a server that need not be ours.

gptoss verify openai/gpt-oss-20b --precision exact
gptoss verify -b torch --dtype bfloat16 --against reference:float32 --length 600
gptoss verify --teacher book.txt --save answers.npz
gptoss verify -b torch --replay answers.npz
gptoss verify --probe /tmp/probe && gptoss verify --server http://127.0.0.1:8080/v1
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gptoss.cli import options
from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.candidates import Running, opened_model, rival
from gptoss.cli.endings import usage
from gptoss.cli.terminal import bar, decoded, document
from gptoss.cli.tracing import replaceable

if TYPE_CHECKING:
    from gptoss.checkpoint.open import Checkpoint
    from gptoss.model.config import ModelConfig
    from gptoss.verify.findings import Finding
    from gptoss.verify.teacher import Answers

LENGTHS = (16, 130, 600, 4200)
LARGE = 1024  # hidden size from which 4,200 tokens in float64 are more than a coffee


@dataclass(frozen=True, kw_only=True)
class Layerwise:
    """What is compared, unless a text or the kit is."""

    against: Annotated[
        str | None,
        Option(help="judge by another backend: torch, torch:float32, native:exact"),
    ] = None
    mode: Annotated[
        Literal["isolated", "propagated", "both"],
        Option(help="each layer on the reference's input, or the whole model"),
    ] = "both"
    length: Annotated[
        list[int] | None,
        Option("--length", min=1, help="of a text; may be repeated", default="16 130 600 4200"),
    ] = None
    layers: Annotated[int | None, Option(min=1, help="only the first layers")] = None


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """By a text."""

    teacher: Annotated[
        str | None, Option(help="compare what is expected after each token of a text or file")
    ] = None
    save: Annotated[
        Path | None, Option(help="with --teacher: keep the reference's answers here")
    ] = None
    replay: Annotated[Path | None, Option(help="compare with answers that --save has kept")] = None


@dataclass(frozen=True, kw_only=True)
class Kit:
    """By planted bugs."""

    kit: Annotated[bool, Option(help="which of the planted bugs the backend may have")] = False
    server: Annotated[
        str | None, Option(help="the same of a server of this checkpoint, by its URL")
    ] = None
    served: Annotated[str | None, Option(help="what the server calls it", default="its first")] = (
        None
    )
    key: Annotated[str | None, Option(help="for the server", envvar="GPTOSS_KEY")] = None


def run(
    model: Annotated[
        str | None,
        Argument(help='"nano", "probe", a path, or a Hugging Face id', envvar="GPTOSS_MODEL"),
    ] = None,
    probe: Annotated[
        Path | None, Option(help="only write the checkpoint in which bugs show best")
    ] = None,
    json_: options.Json = False,
    *,
    layerwise: Layerwise,
    teaching: Teaching,
    kit: Kit,
    running: Running,
) -> None:
    """Layer by layer against float64; or by a text, by planted bugs, by a server's answers.

    Exit status 1: something is wrong.
    """
    check(layerwise, teaching, kit, probe)
    by_bugs = kit.kit or kit.server is not None
    by_text = teaching.teacher is not None or teaching.replay is not None
    if probe is not None:
        from gptoss.verify.probes import write_probe

        print(f"{write_probe(probe)}: serve this, then gptoss verify --server URL", file=sys.stderr)
        return
    with opened_model(model or ("probe" if by_bugs else "nano")) as opened:
        if by_bugs:
            ok = diagnosed(opened, running, kit, json_)
        elif by_text:
            ok = True
            taught(opened, running, layerwise, teaching, json_)
        else:
            ok = compared(opened, running, layerwise, json_)
    if not ok:
        sys.exit(1)


def check(layerwise: Layerwise, teaching: Teaching, kit: Kit, probe: Path | None) -> None:
    """Whether one thing is asked for and not two, and nothing that has no part in it."""
    given = {
        "--teacher": teaching.teacher,
        "--replay": teaching.replay,
        "--server": kit.server,
        "--probe": probe,
        "--kit": kit.kit or None,
    }
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise WrongCommandLine(f"{asked[0]} and {asked[1]} exclude each other")
    way = asked[0] if asked else "layers"
    for name, value, *ways in (
        ("--save", teaching.save, "--teacher"),
        ("--served", kit.served, "--server"),
        ("--length", layerwise.length, "layers"),
        ("--against", layerwise.against, "layers", "--teacher"),
        ("--layers", layerwise.layers, "layers", "--teacher", "--replay"),
    ):
        if value is not None and way not in ways:
            less = f"is for {ways[0]}" if way == "layers" else f"has no part in {way}"
            raise WrongCommandLine(f"{name} {less}")
    if teaching.save is not None:
        replaceable(teaching.save, "--save")


def compared(opened: Checkpoint, running: Running, asked: Layerwise, as_json: bool) -> bool:
    """A line for each trace point, and how it ended."""
    from gptoss.verify.judge import MODES, SLACK
    from gptoss.verify.verify import texts, verify

    with usage():
        candidate = running.candidate(opened, asked.layers)
        judge = rival(asked.against, opened, asked.layers)
    config, found = candidate.config, list[Any]()
    lengths = asked.length or [n for n in LENGTHS if n <= 600 or config.hidden_size < LARGE]
    fitting = [n for n in lengths if n <= config.context_length]
    if asked.length and len(fitting) < len(lengths):
        raise WrongCommandLine(f"--length: the model's context is {config.context_length}")

    def see(finding: Finding) -> None:
        found.append(finding)
        if not as_json and not (running.quiet and finding.ok):
            print(finding, flush=True)

    modes = MODES if asked.mode == "both" else (asked.mode,)
    verify(candidate, texts(config.vocab_size, fitting), see, against=judge, modes=modes)
    wrong = [finding for finding in found if not finding.ok]
    name = f"{candidate.backend} in {candidate.precision.name}"
    end = f"{name}: {len(found)} points, errors within {SLACK:g} times the rounding of a right one"
    if wrong:
        first = wrong[0]
        end = (
            f"{name}: {len(wrong)} of {len(found)} points are wrong, first {first.point} at token "
            f"{first.token} of text {first.text}, {first.mode}"
        )
    if as_json:
        points = [finding.to_json() for finding in found]
        print(document({"ok": not wrong, "summary": end, "lengths": fitting, "points": points}))
    else:
        print(end)
    return not wrong


def taught(
    opened: Checkpoint, running: Running, asked: Layerwise, teaching: Teaching, as_json: bool
) -> None:
    """Agreement, divergence and perplexity on a text."""
    from gptoss.verify import teacher

    with usage():
        candidate = running.candidate(opened, asked.layers)
    theirs = answers(opened, candidate.config, asked, teaching)
    if theirs.about.get("config") != asdict(candidate.config):
        raise WrongCommandLine(f"--replay: {teaching.replay} holds another model's answers")
    found = teacher.agreement(teacher.run(candidate.open(), theirs.tokens.tolist()), theirs)
    print(document(asdict(found)) if as_json else teacher.table(found))


def answers(
    opened: Checkpoint, config: ModelConfig, asked: Layerwise, teaching: Teaching
) -> Answers:
    """What the reference expects after each token of the text, or did when it was kept."""
    from gptoss.llm.tokens import load_tokenizer
    from gptoss.verify import teacher

    if teaching.replay is not None:
        return teacher.Answers.load(teaching.replay)
    assert teaching.teacher is not None
    with usage():
        judge = rival(asked.against, opened, asked.layers)
    text = teaching.teacher
    if os.path.isfile(text):  # unlike Path's, it takes a text of any length
        text = decoded(Path(text).read_bytes(), text)
    tokens = load_tokenizer(opened).encode_with_specials(text)
    if not 2 <= len(tokens) <= config.context_length:
        raise WrongCommandLine(
            f"--teacher: the text has {len(tokens)} tokens, not 2 to {config.context_length}"
        )
    rows = (
        teacher.run(judge.open(), tokens)
        if judge is not None
        else teacher.reference(config, opened.read, tokens)
    )
    by = asked.against or "reference:float64"
    theirs = teacher.ask(rows, tokens, {"by": by, "config": asdict(config)})
    if teaching.save is not None:
        theirs.save(teaching.save)
    return theirs


def diagnosed(opened: Checkpoint, running: Running, kit: Kit, as_json: bool) -> bool:
    """Which bugs a backend or a server may have."""
    from gptoss.llm.tokens import load_tokenizer
    from gptoss.verify.diagnosis import diagnose
    from gptoss.verify.patients import local
    from gptoss.verify.probes import prompts
    from gptoss.verify.remote import Server

    tokenizer = load_tokenizer(opened)
    with usage():
        patient = (
            local(running.candidate(opened, None).open())
            if kit.server is None
            else Server(kit.server, tokenizer, model=kit.served, key=kit.key)
        )
    asked = [tokenizer.encode(text) for text in prompts(tokenizer)]
    with bar("bugs") as watch:
        found = diagnose(opened.config, opened.read, patient, asked, watch)
    print(document(found.to_json()) if as_json else found)
    return found.healthy
