"""``gptoss verify``: whether a backend is right, or a server that need not be ours.

gptoss verify openai/gpt-oss-20b --precision exact
gptoss verify -b torch --dtype bfloat16 --against reference:float32 --length 600
gptoss verify --teacher book.txt --save answers.npz
gptoss verify -b torch --replay answers.npz
gptoss verify --probe /tmp/probe && gptoss verify --server http://127.0.0.1:8080/v1
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gptoss.cli import options
from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.terminal import bar, decoded

if TYPE_CHECKING:
    from gptoss.checkpoint.open import Checkpoint
    from gptoss.verify.candidate import Candidate
    from gptoss.verify.verify import Finding

LENGTHS = (16, 130, 600, 4200)
LARGE = 1024  # hidden size from which 4,200 tokens in float64 are more than a coffee


@dataclass(frozen=True, kw_only=True)
class Running:
    """What is verified."""

    backend: options.Backend = "auto"
    precision: options.Precision = None
    threads: options.Threads = None
    kv: options.Kv = None
    memory: options.Memory = None
    dtype: options.Dtype = None
    device: options.Device = None
    quiet: Annotated[bool, Option("-q", "--quiet", help="only what is wrong, and the end")] = False

    def candidate(self, opened: Checkpoint, layers: int | None) -> Candidate:
        """The backend that this comes to, of some layers of the checkpoint."""
        from gptoss.llm.plan import make_plan
        from gptoss.verify.candidate import Candidate

        plan = make_plan(
            opened,
            backend=self.backend,
            dtype=self.dtype,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            kv=self.kv,
            memory=options.size(self.memory),
        )
        names = ("dtype", "device", "precision", "threads", "kv", "resident")
        config = opened.config
        if layers is not None and layers < config.num_hidden_layers:
            config = replace(config, num_hidden_layers=layers)
        how = {name: getattr(plan, name) for name in names}
        return Candidate(config, opened.read, plan.backend, how)


def run(
    model: Annotated[
        str | None,
        Argument(help='"nano", "probe", a path, or a Hugging Face id', envvar="GPTOSS_MODEL"),
    ] = None,
    against: Annotated[
        str | None,
        Option(help="judge by another backend: torch, torch:float32, native:exact"),
    ] = None,
    mode: Annotated[
        Literal["isolated", "propagated", "both"],
        Option(help="each layer on the reference's input, or the whole model"),
    ] = "both",
    length: Annotated[
        list[int] | None,
        Option("--length", min=1, help="of a text; may be repeated", default="16 130 600 4200"),
    ] = None,
    layers: Annotated[int | None, Option(min=1, help="only the first layers")] = None,
    teacher: Annotated[
        str | None, Option(help="compare what is expected after each token of a text or file")
    ] = None,
    save: Annotated[
        Path | None, Option(help="with --teacher: keep the reference's answers here")
    ] = None,
    replay: Annotated[Path | None, Option(help="compare with answers that --save has kept")] = None,
    kit: Annotated[bool, Option(help="which of the planted bugs the backend may have")] = False,
    server: Annotated[
        str | None, Option(help="the same of a server of this checkpoint, by its URL")
    ] = None,
    served: Annotated[
        str | None, Option(help="what the server calls it", default="its first")
    ] = None,
    key: Annotated[str | None, Option(help="for the server", envvar="GPTOSS_KEY")] = None,
    probe: Annotated[
        Path | None, Option(help="only write the checkpoint in which bugs show best")
    ] = None,
    json_: options.Json = False,
    *,
    running: Running,
) -> None:
    """Layer by layer against float64; or by a text, by planted bugs, by a server's answers.

    Exit status 1: something is wrong.
    """
    given = {"--teacher": teacher, "--replay": replay, "--server": server, "--probe": probe}
    asked = [name for name, value in given.items() if value is not None] + ["--kit"] * kit
    if len(asked) > 1:
        raise WrongCommandLine(f"{asked[0]} and {asked[1]} exclude each other")
    if save is not None and teacher is None:
        raise WrongCommandLine("--save is for --teacher")
    if probe is not None:
        from gptoss.verify.probes import write_probe

        print(f"{write_probe(probe)}: serve this, then gptoss verify --server URL", file=sys.stderr)
        return
    with opened_model(model or ("probe" if kit or server else "nano")) as opened:
        if kit or server:
            ok = diagnosed(opened, running, server, served, key, json_)
        elif teacher is not None or replay is not None:
            ok = True
            taught(opened, running, against, layers, teacher, save, replay, json_)
        else:
            modes = ("isolated", "propagated") if mode == "both" else (mode,)
            ok = layerwise(opened, running, against, layers, modes, length, json_)
    if not ok:
        sys.exit(1)


@contextmanager
def opened_model(model: str) -> Iterator[Checkpoint]:
    """A checkpoint; "probe" is the kit's own."""
    from gptoss.checkpoint.open import open_checkpoint
    from gptoss.llm.models import resolve

    if model != "probe":
        yield open_checkpoint(resolve(model))
        return
    from gptoss.verify.probes import write_probe

    with TemporaryDirectory() as folder:
        yield open_checkpoint(write_probe(Path(folder) / "probe"))


def rival(said: str | None, opened: Checkpoint, layers: int | None) -> Candidate | None:
    """What --against names."""
    if said is None:
        return None
    name, _, numbers = said.partition(":")
    how: dict[str, Any] = {"precision" if name == "native" else "dtype": numbers or None}
    return Running(backend=name, **how).candidate(opened, layers)


def layerwise(
    opened: Checkpoint,
    running: Running,
    against: str | None,
    layers: int | None,
    modes: tuple[str, ...],
    length: list[int] | None,
    as_json: bool,
) -> bool:
    """A line for each trace point, and how it ended."""
    from gptoss.verify.verify import SLACK, texts, verify

    with usage():
        candidate = running.candidate(opened, layers)
        judge = rival(against, opened, layers)
    config, found = candidate.config, list[Any]()
    lengths = length or [n for n in LENGTHS if n <= 600 or config.hidden_size < LARGE]
    fitting = [n for n in lengths if n <= config.context_length]
    if length and len(fitting) < len(lengths):
        raise WrongCommandLine(f"--length: the model's context is {config.context_length}")

    def see(finding: Finding) -> None:
        found.append(finding)
        if not as_json and not (running.quiet and finding.ok):
            print(finding, flush=True)

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
        print(json.dumps({"ok": not wrong, "summary": end, "lengths": fitting, "points": points}))
    else:
        print(end)
    return not wrong


def taught(
    opened: Checkpoint,
    running: Running,
    against: str | None,
    layers: int | None,
    teacher: str | None,
    save: Path | None,
    replay: Path | None,
    as_json: bool,
) -> None:
    """Agreement, divergence and perplexity on a text."""
    from gptoss.llm.tokens import load_tokenizer
    from gptoss.verify import teacher as teaching

    with usage():
        candidate = running.candidate(opened, layers)
        judge = rival(against, opened, layers)
    config = candidate.config
    if replay is not None:
        theirs = teaching.Answers.load(replay)
        if theirs.about.get("config") != asdict(config):
            raise WrongCommandLine(f"--replay: {replay} holds another model's answers")
    else:
        assert teacher is not None
        path = Path(teacher)
        with_file = len(teacher) < 4096 and path.is_file()
        text = decoded(path.read_bytes(), teacher) if with_file else teacher
        tokens = load_tokenizer(opened).encode_with_specials(text)
        if not 2 <= len(tokens) <= config.context_length:
            raise WrongCommandLine(
                f"--teacher: the text has {len(tokens)} tokens, not 2 to {config.context_length}"
            )
        rows = (
            teaching.run(judge.open(), tokens)
            if judge is not None
            else teaching.reference(config, opened.read, tokens)
        )
        by = against or "reference:float64"
        theirs = teaching.ask(rows, tokens, {"by": by, "config": asdict(config)})
        if save is not None:
            theirs.save(save)
    found = teaching.agreement(teaching.run(candidate.open(), theirs.tokens.tolist()), theirs)
    print(json.dumps(asdict(found)) if as_json else teaching.table(found))


def diagnosed(
    opened: Checkpoint,
    running: Running,
    server: str | None,
    served: str | None,
    key: str | None,
    as_json: bool,
) -> bool:
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
            if server is None
            else Server(server, tokenizer, model=served, key=key)
        )
    asked = [tokenizer.encode(text) for text in prompts(tokenizer)]
    with bar("bugs") as watch:
        found = diagnose(opened.config, opened.read, patient, asked, watch)
    print(json.dumps(found.to_json()) if as_json else found)
    return found.healthy
