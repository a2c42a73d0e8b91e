"""``--trace FILE``: what happened at every token of an answer, for ``gptoss diff`` and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gptoss.cli.arguments import Option, WrongCommandLine
from gptoss.cli.options import size
from gptoss.errors import GptOssError

if TYPE_CHECKING:
    from gptoss.llm import LLM
    from gptoss.verify.steps import Steps
    from gptoss.verify.traces import Writer

Points = Annotated[
    list[str] | None,
    Option("--point", help="with --trace: keep these values whole, as attn.q; may be repeated"),
]

Size = Annotated[str | None, Option(help="with --trace: stop at so many bytes", default="10GB")]


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """What is kept of an answer, and where."""

    trace: Annotated[
        Path | None, Option(help="write what happened at every token here (the last answer's)")
    ] = None
    point: Points = None

    def __post_init__(self) -> None:
        check(self.trace, self.point)
        if self.trace is not None:
            replaceable(self.trace, "--trace")

    @contextmanager
    def of(self, llm: LLM, model: str) -> Iterator[None]:
        """Everything that is computed inside is kept, and written at the end."""
        if self.trace is None:
            yield
            return
        from gptoss.checkpoint.open import open_checkpoint
        from gptoss.llm.models import resolve
        from gptoss.verify.record import Recorder, record

        engine = llm.tokens.engine
        recorder = Recorder(engine.backend, open_checkpoint(resolve(model)).read, self.point or ())
        record(engine, recorder)
        try:
            yield
        finally:
            if recorder.row.parts:
                recorder.trace(model=model, backend=llm.plan.backend).save(self.trace)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is kept of every request, and where."""

    trace: Annotated[
        Path | None, Option(help="add what happened at every token of every request to this file")
    ] = None
    trace_size: Size = None
    point: Points = None

    def __post_init__(self) -> None:
        check(self.trace, self.point)
        if self.trace_size is not None and self.trace is None:
            raise WrongCommandLine("--trace-size is for --trace")
        if self.trace_size is not None:
            bytes_of(self.trace_size)

    def writer(self) -> Writer | None:
        """What writes the file. Raises GptOssError: there is a file of another kind."""
        if self.trace is None:
            return None
        return writer_of(self.trace, self.trace_size)

    def attach(self, writer: Writer | None, llm: LLM, model: str) -> None:
        """From now on all requests are recorded as they run."""
        if writer is None:
            return
        from gptoss.checkpoint.open import open_checkpoint
        from gptoss.llm.models import resolve
        from gptoss.verify.requests import Requests

        requests = Requests(
            llm.tokens.engine,
            open_checkpoint(resolve(model)).read,
            writer,
            self.point or (),
            model=model,
            backend=llm.plan.backend,
        )
        requests.attach()


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """What is kept of a training, and where."""

    trace: Annotated[
        Path | None, Option(help="add what was computed of every token of a step to this file")
    ] = None
    trace_every: Annotated[
        int | None, Option(min=1, help="with --trace: of each so-manieth step", default="1")
    ] = None
    trace_size: Size = None
    point: Points = None

    def __post_init__(self) -> None:
        check(self.trace, self.point)
        if self.trace is None and (self.trace_every or self.trace_size):
            raise WrongCommandLine("--trace-every and --trace-size are for --trace")
        if self.trace_size is not None:
            bytes_of(self.trace_size)

    @contextmanager
    def observer(self, model: str) -> Iterator[Steps | None]:
        """What a recipe may show its batches. Raises GptOssError: the file is another kind."""
        if self.trace is None:
            yield None
            return
        from gptoss.verify.steps import Steps

        with closing(writer_of(self.trace, self.trace_size)) as writer:
            yield Steps(writer, self.trace_every or 1, self.point or (), model=model)


def writer_of(trace: Path, said: str | None) -> Writer:
    """What adds to the file of ``--trace``. Raises GptOssError: it is a file of another kind."""
    from gptoss.verify.traces import MOST, Writer

    return Writer(trace, MOST if said is None else bytes_of(said))


def bytes_of(said: str) -> int:
    """What --trace-size says."""
    try:
        return size(said) or 0
    except WrongCommandLine:
        raise WrongCommandLine(f"--trace-size: {said!r} is not a size such as 12GB") from None


def check(trace: Path | None, points: list[str] | None) -> None:
    """Whether there is anything to write, and a place: a slip must not wait for a model to load."""
    if points and trace is None:
        raise WrongCommandLine("--point is for --trace")
    if points:
        from gptoss.verify.trace import LAYER, POINTS, is_point

        for name in points:
            if not is_point(name):
                known = ", ".join((*POINTS, *LAYER))
                raise WrongCommandLine(f"--point: {name!r} is none of {known}, or one of block.N")
    if trace is not None:
        writable(trace, "--trace")


def writable(path: Path, option: str) -> None:
    """Raises GptOssError: there can be no such file."""
    if path.is_dir() or not path.parent.is_dir():
        raise GptOssError(f"{path}: cannot be written; {option} names a file in a directory")


def replaceable(path: Path, option: str) -> None:
    """Raises GptOssError: a file is there that is no .npz, such as one of many traces."""
    writable(path, option)
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(2) not in (b"", b"PK"):
            raise GptOssError(f"{path}: holds something else; {option} names another file")
