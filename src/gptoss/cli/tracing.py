"""``--trace FILE``: what happened at every token of an answer, for ``gptoss diff`` and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gptoss.cli.arguments import Option, WrongCommandLine

if TYPE_CHECKING:
    from gptoss.llm import LLM


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """What is kept, and where."""

    trace: Annotated[
        Path | None, Option(help="write what happened at every token here (the last answer's)")
    ] = None
    point: Annotated[
        list[str] | None,
        Option("--point", help="with --trace: keep these values whole, as attn.q; may be repeated"),
    ] = None

    @contextmanager
    def of(self, llm: LLM, model: str) -> Iterator[None]:
        """Everything that is computed inside is kept, and written at the end."""
        if self.point and self.trace is None:
            raise WrongCommandLine("--point is for --trace")
        if self.trace is None:
            yield
            return
        from gptoss.checkpoint.open import open_checkpoint
        from gptoss.llm.models import resolve
        from gptoss.verify.trace import Recorder, record

        engine = llm.tokens.engine
        recorder = Recorder(engine.backend, open_checkpoint(resolve(model)).read, self.point or ())
        record(engine, recorder)
        try:
            yield
        finally:
            if recorder.rows:
                recorder.trace(model=model, backend=llm.plan.backend).save(self.trace)
