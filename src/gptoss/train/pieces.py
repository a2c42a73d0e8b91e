"""Tensors of which each process has a part, in a checkpoint's directory.

Every process writes a file of its own (``torch.distributed.checkpoint``), and a note stands for the
tensor in ``state.pt``. However many processes read it, each gets the part that is then its own, and
one process gets it whole.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from gptoss.errors import CheckpointError
from gptoss.train.divide import grouped
from gptoss.train.folder import heard

NOTE = "in pieces"
UNREADABLE = "cannot be read ({}); remove it, and the run goes on from the one before"
Heads = tuple[int, int, int] | None  # rows are in the order of ``divide.grouped``, of these


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of which this process has a part."""

    tensor: DTensor
    heads: Heads = None


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that a checkpoint has in pieces."""

    path: Path
    key: str
    heads: Heads


def write(state: Any, path: Path, target: Path) -> Any:
    """Write the pieces in ``state``, as all processes do -> ``state`` with notes for them.

    ``target``: what ``path`` will be called. Raises CheckpointError, everywhere, if one cannot.
    """
    found: dict[str, Tensor] = {}

    def note(x: Any, key: str) -> Any:
        if not isinstance(x, Piece):
            return x
        found[key] = x.tensor
        return NOTE, key, x.heads

    noted = _changed(state, note)
    with _one_sentence(target, "could not be written: {}. Nothing was left behind."):
        save(found, storage_writer=_Writer(path))
    return noted


class _Writer(FileSystemWriter):
    """What the system says of a failed write, all processes are told."""

    def write_data(self, *plan: Any) -> Any:
        with heard():
            return super().write_data(*plan)


def kept(state: Any, path: Path) -> Any:
    """``state`` with a ``Kept`` for each note."""
    return _changed(state, lambda x, _: Kept(path, *x[1:]) if _is_note(x) else x)


def whole(state: Any, path: Path) -> Any:
    """``state`` with the tensor for each note, as one process has it."""
    found: dict[str, Tensor] = {}
    with _one_sentence(path, UNREADABLE):
        known: Any = FileSystemReader(path).read_metadata().state_dict_metadata
        for key, its in known.items():
            found[key] = torch.empty(its.size, dtype=its.properties.dtype)
    _load(found, path, alone=True)

    def tensor(x: Any, _: str) -> Any:
        if not _is_note(x):
            return x
        _, key, heads = x
        return grouped(found[key], heads, back=True) if heads else found[key]

    return _changed(state, tensor)


def read(wanted: Mapping[Kept, DTensor]) -> None:
    """Fill each tensor from where it is kept, as all processes do: each its part."""
    for path in {each.path for each in wanted}:
        _load({each.key: x for each, x in wanted.items() if each.path == path}, path)


def _load(found: dict[str, Any], path: Path, *, alone: bool = False) -> None:
    with _one_sentence(path, UNREADABLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody else reads
        reader = FileSystemReader(path)
        load(found, storage_reader=reader, no_dist=alone)


@contextmanager
def _one_sentence(path: Path, said: str) -> Iterator[None]:
    """A CheckpointError for whatever ``torch.distributed.checkpoint`` raises."""
    try:
        yield
    except (CheckpointException, OSError, UnpicklingError, ValueError, EOFError) as found:
        error: Any = found
        if isinstance(found, CheckpointException):
            error = next(iter(found.failures.values()))[0]  # of one process
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [repr(error)])[0]
        raise CheckpointError(f"{path}: {said.format(reason)}") from None


def _changed(x: Any, change: Callable[[Any, str], Any], key: str = "") -> Any:
    """What is inside dicts and lists, changed; ``change`` is told where it is."""
    if isinstance(x, dict):
        return {name: _changed(inner, change, f"{key}/{name}") for name, inner in x.items()}
    if isinstance(x, list):
        return [_changed(inner, change, f"{key}/{i}") for i, inner in enumerate(x)]
    return change(x, key)


def _is_note(x: Any) -> bool:
    return isinstance(x, tuple) and x[:1] == (NOTE,)
