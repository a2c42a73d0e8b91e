"""A row of a cache as a file: a long prompt is read once, and gone on with on another day.

A file says its tokens and what made it: keys and values are good for one model, run in one way.
It is a safetensors file, read with the suspicion that checkpoints are read with.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

import numpy as np

from gptoss.backends.protocol import Cache
from gptoss.backends.slots import Arrays
from gptoss.checkpoint import safetensors
from gptoss.checkpoint.files import shown
from gptoss.checkpoint.staged import staged_file
from gptoss.errors import CacheFull, CheckpointError

ALIGNED = 8  # bytes
LONGEST = 1 << 16  # bytes in which a file says what made it
Made = Mapping[str, str | None]  # by what: the model, the backend, its dtype, ...


@runtime_checkable
class RowCache(Cache, Protocol):
    """A cache whose rows can be kept."""

    def dump(self, slot: int) -> Arrays:
        """The keys and values of a row on the host, by names of the room's own."""

    def fill(self, slot: int, length: int, arrays: Arrays) -> None:
        """Put into an empty slot what ``dump`` gave of a row of ``length`` tokens.

        Raises ValueError, and changes nothing, if that cannot be such a row.
        """


def save_row(cache: Cache, slot: int, tokens: Sequence[int], path: Path | str, made: Made) -> None:
    """Write the row in ``slot``, which holds ``tokens``; what was at ``path`` is replaced.

    Raises:
        GptOssError: it cannot be written; what was there stays.
    """
    assert isinstance(cache, RowCache) and len(tokens)
    said = np.frombuffer(json.dumps(dict(made)).encode(), np.uint8)
    arrays = {**cache.dump(slot), "tokens": np.asarray(tokens, np.int32), "made": said}
    with staged_file(Path(path)) as file:
        _write(file, arrays)


def load_row(cache: Cache, path: Path | str, made: Made) -> tuple[int, list[int]]:
    """A new slot with the row that ``save_row`` wrote, and its tokens.

    Raises:
        CheckpointError: the file is damaged, or of another model or another way of running it.
        CacheFull: there is no room for so many tokens.
    """
    assert isinstance(cache, RowCache)
    arrays = _read(path)
    tokens, said = arrays.pop("tokens", np.zeros(0)), arrays.pop("made", np.zeros(0))
    if tokens.dtype != np.int32 or tokens.ndim != 1 or not len(tokens) or not said.size:
        raise CheckpointError(f"{path}: not a row of keys and values")
    _agree(path, said.tobytes(), made)
    slot = cache.open()
    try:
        cache.reserve(slot, len(tokens))
        cache.fill(slot, len(tokens), arrays)
    except ValueError as error:
        cache.close(slot)
        raise CheckpointError(f"{path}: its keys and values are damaged: {error}") from None
    except CacheFull as error:
        cache.close(slot)
        raise CacheFull(f"{path}: {error}; raise max_tokens (--context)") from None
    except BaseException:
        cache.close(slot)
        raise
    return slot, tokens.tolist()


def _read(path: Path | str) -> Arrays:
    try:
        return {name: tensor.array() for name, tensor in safetensors.read(path).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{error} If it was a prompt's cache, delete it.") from None


def _agree(path: Path | str, said: bytes, made: Made) -> None:
    try:
        theirs = json.loads(said) if len(said) <= LONGEST else None
    except (ValueError, RecursionError):
        theirs = None
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{path}: does not say what made it")
    for name in dict.fromkeys([*made, *theirs]):
        if (other := theirs.get(name)) != (mine := made.get(name)):
            raise CheckpointError(
                f"{path}: made with {name} {shown(other)}, not {shown(mine)}; keys and values are "
                "good for one model, run in one way"
            )


def _write(file: IO[bytes], arrays: Arrays) -> None:
    names = {np.dtype(dtype): name for name, dtype in safetensors.DTYPES.items()}
    entries, at = {}, 0
    for name, x in arrays.items():
        place = [at, at := at + x.nbytes]
        entries[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": place}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % ALIGNED)
    file.write(len(head).to_bytes(8, "little") + head)
    for x in arrays.values():
        file.write(np.ascontiguousarray(x).tobytes())
