"""A run's directory: one run at a time, checkpoints that are whole or not there, exact resumption.

    config.json       what was asked for; a run that goes on must ask for the same
    metrics.jsonl     a line per step
    states/00000200/  everything that step 200 ended with
    lock              held by the process that trains

A killed run leaves whole checkpoints and perhaps lines of steps that came after the last one; who
goes on forgets those lines, computes the steps again, and gets the same numbers.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import torch

from gptoss.checkpoint.staged import staged, sync
from gptoss.errors import CheckpointError, TrainingError
from gptoss.train.config import NEW
from gptoss.train.ranks import ALONE, Ranks

try:
    import fcntl
except ImportError:  # Windows: nobody watches that two runs do not share a directory
    fcntl = None  # type: ignore[assignment]


IN_PIECES = ".metadata"  # of a checkpoint that several processes wrote


class Folder:
    """See the module. ``asked`` is what the run was begun with, as JSON holds it.

    Raises:
        TrainingError: another run is at work here, or one that was begun with something else.
    """

    def __init__(self, path: Path | str, asked: dict[str, Any], ranks: Ranks = ALONE) -> None:
        self.path, self.ranks = Path(path), ranks
        self.states, self.metrics = self.path / "states", self.path / "metrics.jsonl"
        self._lock: int | None = None
        ranks.led(lambda: self._open(json.loads(json.dumps(asked))))

    def _open(self, asked: dict[str, Any]) -> None:
        self.states.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        try:
            self._agree(asked)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others train here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _agree(self, asked: dict[str, Any]) -> None:
        path = self.path / "config.json"
        if self.latest() is not None:
            begun = read_document(path)
            unknown = {name for name in asked if name not in begun and not asked[name]}
            for name in sorted({*begun, *asked} - NEW - unknown):  # what is off may be newer
                if begun.get(name) != asked.get(name):
                    raise TrainingError(
                        f"{self.path}: this run was begun with {name} {begun.get(name)!r}, not "
                        f"{asked.get(name)!r}. Go on with the same, or choose another directory."
                    )
        _replace(path, json.dumps(asked, indent=2) + "\n")

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return newest(self.path)

    def load(self, *, mapped: bool = False) -> dict[str, Any] | None:
        """What the newest checkpoint holds; lines of later steps are removed from the metrics.

        ``mapped``: read as it is used, not into memory at once.
        """
        latest = self.latest()
        state: dict[str, Any] | None = None
        if latest is not None:
            state = read_state(latest, mapped=mapped, whole=self.ranks.alone)
        self.ranks.led(lambda: self._forget(state["step"] if state else 0))
        return state

    def save(self, step: int, state: dict[str, Any]) -> None:
        """All of ``state``, or nothing. Raises CheckpointError; older checkpoints are untouched.

        Of several processes, each writes what of ``state`` is its own.
        """
        target = self.states / f"{step:08}"
        if target.exists():
            return
        with staged(target, _nbytes(state)) if self.ranks.first else nullcontext() as partial:
            if not self.ranks.alone:
                from gptoss.train import pieces  # seconds to import

                state = pieces.write(state, Path(str(self.ranks.gather(partial)[0])), target)
            if partial is not None:
                with (partial / "state.pt").open("wb") as file:
                    write(state, file)
                    file.flush()
                    os.fsync(file.fileno())
        self.ranks.gather(None)  # nobody goes on before it is there

    def prune(self, keep: int, milestone: int | None) -> None:
        """Leave the ``keep`` newest checkpoints and the milestones.

        What goes loses its name first: killed in between, nobody finds half of a checkpoint.
        """
        if not self.ranks.first:
            return
        steps = sorted((p for p in self.states.iterdir() if p.name.isdigit()), key=lambda p: p.name)
        for old in steps[:-keep]:
            if not milestone or int(old.name) % milestone:
                with suppress(OSError):
                    old.rename(self.states / f".{old.name}.gone")
        for gone in self.states.glob(".*.gone"):
            shutil.rmtree(gone, ignore_errors=True)

    def append(self, row: dict[str, Any]) -> None:
        """A line of metrics. Raises CheckpointError if it cannot be written."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.metrics}: cannot be written: {error.strerror}") from None

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics, without one that was cut off."""
        found = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return [row for row in found if isinstance(row, dict) and "step" in row]

    def _forget(self, step: int) -> None:
        rows = [row for row in self.rows() if row["step"] <= step]
        _replace(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def newest(path: Path | str) -> Path | None:
    """The newest checkpoint of the run in a directory."""
    states = Path(path) / "states"
    steps = [p for p in states.iterdir() if p.name.isdigit()] if states.is_dir() else []
    return max(steps, key=lambda p: int(p.name), default=None)


def restore(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put trained parameters back where they were."""
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)


def write(state: dict[str, Any], file: IO[bytes]) -> None:
    """``torch.save``, and what the system said if it failed."""
    with heard():
        torch.save(state, file)


@contextmanager
def heard() -> Iterator[None]:
    """Raises the OSError that torch hides where a write fails."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_state(path: Path, *, mapped: bool = False, whole: bool = True) -> dict[str, Any]:
    """What a checkpoint of a run holds. Raises CheckpointError if it cannot be read.

    ``whole``: also what several processes wrote in pieces; else, where these are.
    """
    file = path / "state.pt"
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); remove it, and the run goes on from the one before"
        ) from None
    if not (path / IN_PIECES).exists():
        return state
    from gptoss.train import pieces  # seconds to import

    found: dict[str, Any] = (pieces.whole if whole else pieces.kept)(state, path)
    return found


def _nbytes(value: Any) -> int:
    """Of all tensors inside."""
    if isinstance(value := getattr(value, "tensor", value), torch.Tensor):  # in pieces, too
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value
    return sum(map(_nbytes, inner)) if isinstance(value, dict | list | tuple) else 0


def _locked(path: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise TrainingError(
            f"{path}: another run is training in this directory; wait for it or choose another"
        ) from None
    return descriptor


def read_document(path: Path) -> dict[str, Any]:
    """A JSON file of a run. Raises TrainingError."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); is this a run's?") from None
    if not isinstance(found, dict):
        raise TrainingError(f"{path}: expected a JSON object; is this a run's?")
    return found


def _replace(path: Path, text: str) -> None:
    """Write a small file in one go. Raises CheckpointError; the old one stays."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        sync(new)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None
