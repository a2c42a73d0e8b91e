"""What ``gptoss verify`` and ``diff`` look at: a backend of a checkpoint, and its options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from gptoss.cli import options
from gptoss.cli.arguments import Option

if TYPE_CHECKING:
    from gptoss.checkpoint.open import Checkpoint
    from gptoss.verify.candidate import Candidate


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
