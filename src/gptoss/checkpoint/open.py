"""Open a checkpoint of any known layout: check everything the headers say, read nothing else.

What opens is whole: every tensor that the config calls for is there once, with its shape and a
dtype that can be read, and no other tensor is. Whether the numbers are finite is ``check``'s
question, because it has to read them all.
"""

import difflib
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.checkpoint.files import read_json, shown, some
from gptoss.checkpoint.huggingface import HUGGINGFACE, HUGGINGFACE_BF16
from gptoss.checkpoint.layout import Entry, Layout
from gptoss.checkpoint.mlx import MLX, interleaved, is_mlx, packed, unrounded
from gptoss.checkpoint.openai import ORIGINAL
from gptoss.checkpoint.safetensors import HostTensor
from gptoss.checkpoint.shards import SUPPORTED, find, read_all, unfinished
from gptoss.errors import CheckpointError
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK, Packed
from gptoss.model.weights import Stored

LAYOUTS = {layout.name: layout for layout in (ORIGINAL, HUGGINGFACE, HUGGINGFACE_BF16, MLX)}
DENSE = ("BF16", "F32", "F16")
PLACES, SAMPLE = 8, 1024  # of a tensor, and bytes at each, by which it is told from others
CHUNK = 1 << 20  # values that ``check`` looks at together
# Where each format keeps its exponent, and the integer of its width.
EXPONENT: dict[str, tuple[Any, Any]] = {
    "bfloat16": (np.uint16(0x7F80), np.uint16),
    "float16": (np.uint16(0x7C00), np.uint16),
    "float32": (np.uint32(0x7F800000), np.uint32),
    "uint8": (np.uint8(0xFF), np.uint8),
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose headers have been read and found complete."""

    path: Path  # as given: the directory or the file
    config: ModelConfig
    layout: Layout
    files: tuple[Path, ...]  # the .safetensors files
    nbytes: int  # of those files on disk
    tensors: Mapping[str, HostTensor]  # by the file's own names, file by file

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.layout.name}, {self.nbytes} bytes)"

    @property
    def tokenizer_path(self) -> Path | None:
        """``tokenizer.json`` beside the weights, where there is one."""
        path = self.files[0].parent / "tokenizer.json"
        return path if path.is_file() else None

    def read(self, name: str) -> Stored:
        """A canonical tensor as stored, read-only: an array, or ``Packed`` experts.

        Views into the mapped files; only what the canonical layout fuses is copied together:
        Hugging Face's queries, keys and values, and MLX's gate and up.
        """
        if name not in self._parts:
            raise self._unknown(name)
        parts = {e.part: self.tensors[e.name].array() for e in self._parts[name]}
        match self._parts[name][0].part:
            case "blocks" | "scales":
                return Packed(parts["blocks"], parts["scales"])
            case "words":
                return packed(self._parts[name], self.tensors)
            case "half":
                return interleaved([self.tensors[e.name].array() for e in self._parts[name]])
            case "rows":
                rows = [self.tensors[e.name].array() for e in self._parts[name]]
                return np.concatenate(rows)
            case "transposed":
                view: Stored = parts["transposed"].swapaxes(1, 2)
                return view
            case _:
                return parts["whole"]

    def dense(self, name: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """A canonical tensor as numbers; packed experts are decoded. Read-only if stored so."""
        stored = self.read(name)
        if isinstance(stored, Packed):
            return stored.decode(dtype)
        numbers: npt.NDArray[Any] = stored.astype(dtype, copy=False)
        return numbers

    def get(self, name: str) -> Stored:
        """A tensor by its canonical name, or raw by the name the file gives it."""
        if name not in self._parts and name in self.tensors:
            return self.tensors[name].array()
        return self.read(name)

    def check(self) -> None:
        """Read every byte once, in bounded memory, and refuse weights that are no numbers.

        Raises:
            CheckpointError: a dense tensor has an infinity or a NaN, or a scale of MXFP4 is 255.
        """
        for tensor in self.tensors.values():
            if self._entries[tensor.name].part in ("blocks", "words"):
                continue  # every nibble is a number
            for start, chunk in _chunks(tensor):
                bad = _no_number(chunk)
                if bad.any():
                    at = np.unravel_index(start + int(bad.argmax()), tensor.shape)
                    raise CheckpointError(
                        f"{tensor.path}: {shown(tensor.name)} at {[int(i) for i in at]} is "
                        f"{chunk[bad.argmax()]}, which is no finite weight. The file is damaged, "
                        "or the training that wrote it diverged."
                    )
                tensor.release()

    def fingerprint(self) -> str:
        """Of the files' tensors, by some bytes of each: trained further, they have another one."""
        found = hashlib.sha256(repr(self.config).encode())
        for tensor in self.tensors.values():
            found.update(tensor.name.encode())
            end = tensor.offset + tensor.nbytes
            for at in range(tensor.offset, end, max(SAMPLE, tensor.nbytes // PLACES)):
                found.update(tensor.mapped[at : min(at + SAMPLE, end)])
        return found.hexdigest()[:16]

    def release(self) -> None:
        """Give the memory of what was read back to the system; views stay valid, and read again.

        After loading: much was only read to be copied or rounded.
        """
        for tensor in self.tensors.values():
            tensor.release()

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.layout.entries(self.config)}

    @cached_property
    def _parts(self) -> dict[str, list[Entry]]:
        parts = defaultdict(list)
        for entry in sorted(self._entries.values(), key=lambda e: e.rows):
            parts[entry.canonical].append(entry)
        return dict(parts)

    def _unknown(self, name: str) -> CheckpointError:
        near = difflib.get_close_matches(name, [*self._parts, *self.tensors], 3, 0.5)
        hint = f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
        return CheckpointError(f"{self.path}: there is no tensor {shown(name)}.{hint}")


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read the headers of a checkpoint and check that it is whole.

    ``path`` is a directory (its own files count, never those of folders within, such as the
    ``original`` that is published inside the Hugging Face one) or one ``.safetensors`` file.

    Raises:
        CheckpointError: nothing there, something else, or anything missing, damaged, left over or
            contradictory.
    """
    path = Path(path)
    try:
        return _open(path, path if path.is_dir() else path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except CheckpointError as error:
        folder = path if path.is_dir() else path.parent
        if not path.exists() or not (left := unfinished(folder)):
            raise
        raise CheckpointError(f"{error} {left} lies there: an unfinished download.") from None


def layout_of(names: Iterable[str], origin: str = "checkpoint") -> Layout:
    """The layout whose tensors are called like these.

    Raises:
        CheckpointError: no layout of gpt-oss is.
    """
    names = list(names)
    ours = [n for n in names if n.startswith("block.") or n == "embedding.weight"]
    theirs = [n for n in names if n.startswith("model.layers.") or n == "model.embed_tokens.weight"]
    if ours and theirs:
        raise CheckpointError(
            f"{origin}: mixes the original layout ({shown(ours[0])}) with Hugging Face's "
            f"({shown(theirs[0])}). Keep the two in directories of their own."
        )
    if ours:
        return ORIGINAL
    if theirs and is_mlx(theirs):
        return MLX
    if theirs:
        four_bits = any(n.endswith(("_blocks", "_scales")) for n in theirs)
        return HUGGINGFACE if four_bits else HUGGINGFACE_BF16
    found = f"tensors called {some(names)}" if names else "no tensors"
    raise CheckpointError(f"{origin}: {found}; this is no gpt-oss checkpoint. {SUPPORTED}")


def _open(path: Path, folder: Path) -> Checkpoint:
    if re.fullmatch(r"\..+\.partial-\d+", folder.resolve().name):
        raise CheckpointError(
            f"{path}: this checkpoint is still being written, or its writer was stopped. "
            "Write it again."
        )
    files, placed = find(path)
    tensors = read_all(files, placed, folder)
    config_path = folder / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{config_path}: missing. Without it the weights have no meaning.")
    config = ModelConfig.from_json(read_json(config_path), origin=str(config_path))
    layout = layout_of(tensors, str(path))
    if layout is MLX:
        tensors = unrounded(tensors, config, str(path))
    _check(path, config, layout, tensors)
    nbytes = sum({t.path: len(t.mapped) for t in tensors.values()}.values())
    return Checkpoint(path, config, layout, tuple(files), nbytes, tensors)


def _check(path: Path, c: ModelConfig, layout: Layout, tensors: dict[str, HostTensor]) -> None:
    """One error with all that is wrong between config and tensors."""
    if layout.packed and (c.hidden_size % BLOCK or c.intermediate_size % BLOCK):
        raise CheckpointError(
            f"{path}: MXFP4 packs blocks of {BLOCK}, but hidden_size is {c.hidden_size} and "
            f"intermediate_size is {c.intermediate_size}"
        )
    entries = layout.entries(c)
    names = {e.name for e in entries}
    faults = {
        "missing tensors": [shown(n) for n in sorted(names - set(tensors))],
        "unknown tensors": [shown(n) for n in sorted(set(tensors) - names)],
        "tensors of another shape than the config calls for": _misshapen(entries, tensors),
        "tensors of a dtype that cannot stand there": _mistyped(entries, tensors),
    }
    said = [f"{len(f)} {kind} ({_handful(f)})" for kind, f in faults.items() if f]
    if said:
        part = (
            "files are missing" if path.is_dir() else "this is one of several (give the directory)"
        )
        raise CheckpointError(
            f"{path}: as a checkpoint in the {layout.name} layout, it has {'; '.join(said)}. "
            f"Either {part}, or config.json and weights belong to different models."
        )


def _handful(items: list[str]) -> str:
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")


def _misshapen(entries: list[Entry], tensors: dict[str, HostTensor]) -> list[str]:
    return [
        f"{e.name} {list(tensors[e.name].shape)} for {list(e.shape)}"
        for e in entries
        if e.name in tensors and tensors[e.name].shape != e.shape
    ]


def _mistyped(entries: list[Entry], tensors: dict[str, HostTensor]) -> list[str]:
    here = [(e, tensors[e.name].dtype) for e in entries if e.name in tensors]
    faults = []
    for e, dtype in here:
        allowed = (e.dtype,) if e.dtype in ("U8", "U32") else DENSE
        if dtype not in allowed:
            faults.append(f"{e.name} is {dtype}, not {' or '.join(allowed)}")
    pairs = {(e.canonical, dtype) for e, dtype in here if e.part == "rows"}
    fused = Counter(canonical for canonical, _ in pairs)
    return faults + [f"the rows of {name} differ" for name, n in fused.items() if n > 1]


def _chunks(tensor: HostTensor) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Pieces of a tensor, flat, each with the place of its first value."""
    flat = tensor.array().reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield start, flat[start : start + CHUNK]


def _no_number(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where the exponent is all ones: infinity and NaN, and 255 in a scale, which is nothing else.

    In bfloat16, looking at bits is several times faster than ``isfinite``.
    """
    mask, whole = EXPONENT[values.dtype.name]
    bad: npt.NDArray[np.bool_] = (values.view(whole) & mask) == mask
    return bad
