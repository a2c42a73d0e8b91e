"""The layout that mlx-lm writes: Hugging Face's names, gate and up apart, nibbles in words.

Experts lie in MXFP4, eight nibbles in a little-endian uint32, the same bytes as everywhere. Other
matrices may be rounded, ``scale * integer + bias`` by groups along a row: they open as the float32
numbers they stand for, decoded when they are read. Nothing is rounded on writing.

Source: https://github.com/ml-explore/mlx-lm, models/gpt_oss.py and utils.py (read for the names).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.checkpoint.files import shown
from gptoss.checkpoint.huggingface import entries as huggingface_entries
from gptoss.checkpoint.layout import Entry, Layout
from gptoss.checkpoint.safetensors import HostTensor
from gptoss.errors import CheckpointError
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK, Packed
from gptoss.model.weights import specs

QUANTIZATION = {"group_size": BLOCK, "bits": 4, "mode": "mxfp4"}  # of config.json
WORD = 8  # nibbles in a uint32
BITS = (2, 4, 8)  # of a rounded value; MLX spreads 3, 5 and 6 bits over the bounds of words
STRIP = 64  # rows decoded together
HALVES = {"gate": 0, "up": 1}


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor, in the order of the forward pass, as when nothing but experts is packed."""
    experts = {spec.name: spec.shape for spec in specs(config) if ".mlp.mlp" in spec.name}
    table = []
    for canonical, same in groupby(huggingface_entries(config, packed=True), _canonical):
        if canonical not in experts:
            table += list(same)
            continue
        E, rows, *columns = experts[canonical]
        here = f"model.layers.{canonical.split('.')[1]}.mlp.experts"
        halves = HALVES if ".mlp1_" in canonical else {"down": None}
        for kind, half in halves.items():
            shape, stem = (E, rows // len(halves)), f"{here}.{kind}_proj"
            if not columns:
                table.append(Entry(f"{stem}.bias", shape, canonical, "half", half=half))
                continue
            words, scales = (*shape, columns[0] // WORD), (*shape, columns[0] // BLOCK)
            table.append(Entry(f"{stem}.weight", words, canonical, "words", half=half))
            table.append(Entry(f"{stem}.scales", scales, canonical, "scales", half=half))
    return table


MLX = Layout("mlx", True, entries)


def is_mlx(names: Iterable[str]) -> bool:
    """Whether these are mlx-lm's names for experts."""
    return any(".mlp.experts.gate_proj." in name for name in names)


def packed(parts: Sequence[Entry], tensors: Mapping[str, Any]) -> Packed:
    """The experts' matrices; gate and up are copied together, in rows that take turns."""
    words = [tensors[e.name].array() for e in parts if e.part == "words"]
    scales = [tensors[e.name].array() for e in parts if e.part == "scales"]
    blocks = [x.view(np.uint8).reshape(*s.shape, -1) for x, s in zip(words, scales, strict=True)]
    return Packed(interleaved(blocks), interleaved(scales))


def interleaved(halves: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """[E, F, ...] of one, or of gate and up -> [E, 2F, ...], even rows gate."""
    if len(halves) == 1:
        return halves[0]
    E, F, *rest = halves[0].shape
    both: npt.NDArray[Any] = np.stack(halves, axis=2)
    return both.reshape(E, 2 * F, *rest)


def rows_of(entry: Entry) -> tuple[slice, slice]:
    """What an entry takes of a canonical stack: all rows, or every other one."""
    return slice(None), slice(None) if entry.half is None else slice(entry.half, None, 2)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix of ``scale * integer + bias``, to be used in place of a ``HostTensor``."""

    words: HostTensor  # uint32 [rows, columns * bits / 32]
    scales: HostTensor  # [rows, columns / group]
    biases: HostTensor  # as scales
    shape: tuple[int, ...]
    bits: int

    dtype = "F32"
    aligned = True

    def __getattr__(self, name: str) -> Any:
        """``name``, ``path``, ``offset`` and ``mapped`` are those of the integers."""
        return getattr(self.words, name)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.words.nbytes + self.scales.nbytes + self.biases.nbytes

    def array(self) -> npt.NDArray[np.float32]:
        """The numbers, computed now, in float32."""
        words, each = self.words.array(), np.arange(0, 32, self.bits, dtype=np.uint32)
        mask = np.uint32((1 << self.bits) - 1)
        scales, biases = (x.array().astype(np.float32) for x in (self.scales, self.biases))
        out = np.empty(self.shape, np.float32)
        groups = out.reshape(*scales.shape, -1)
        for start in range(0, len(words), STRIP):
            rows = slice(start, start + STRIP)
            integers = ((words[rows, :, None] >> each) & mask).reshape(groups[rows].shape)
            groups[rows] = scales[rows, :, None] * integers + biases[rows, :, None]
        self.release()
        return out

    def release(self) -> None:
        """See ``HostTensor.release``."""
        for tensor in (self.words, self.scales, self.biases):
            tensor.release()


def unrounded(
    tensors: dict[str, HostTensor], config: ModelConfig, origin: str
) -> dict[str, HostTensor]:
    """``tensors`` with ``Rounded`` ones where weight, scales and biases belong together.

    Raises:
        CheckpointError: experts are rounded, or a matrix in a way that is not read.
    """
    shapes = {e.name: e.shape for e in entries(config) if e.part in ("whole", "rows")}
    found: dict[str, Any] = dict(tensors)
    for name, words in tensors.items():
        stem = name.removesuffix(".weight")
        if words.dtype != "U32" or stem == name or f"{stem}.scales" not in tensors:
            continue
        if ".mlp.experts." in stem:
            if f"{stem}.biases" in tensors:
                raise CheckpointError(
                    f"{origin}: {shown(stem)} is rounded a second time; only experts in MXFP4 are "
                    "read. Convert the published checkpoint with `gptoss convert --to mlx`."
                )
            continue
        scales, biases = (tensors.get(f"{stem}.{x}") for x in ("scales", "biases"))
        shape = shapes.get(name)
        bits = _bits(words, scales, biases, shape)
        if bits is None:
            raise CheckpointError(
                f"{origin}: {shown(name)} {list(words.shape)} is rounded in a way that is not "
                f"read; known are groups of {', '.join(map(str, BITS))} bits with scales and "
                f"biases, for {'no such matrix' if shape is None else list(shape)}"
            )
        assert scales and biases and shape
        found[name] = Rounded(words, scales, biases, shape, bits)
        del found[f"{stem}.scales"], found[f"{stem}.biases"]
    return found


def _canonical(entry: Entry) -> str:
    return entry.canonical


def _bits(
    words: HostTensor, scales: HostTensor | None, biases: HostTensor | None, shape: Any
) -> int | None:
    """Of a rounded value, if everything fits together."""
    if scales is None or biases is None or shape is None or len(shape) != 2:
        return None
    rows, columns = shape
    fits = len(words.shape) == len(scales.shape) == 2 and scales.shape == biases.shape
    known = {scales.dtype, biases.dtype} <= {"BF16", "F16", "F32"}
    if not (fits and known and words.shape[0] == scales.shape[0] == rows and scales.shape[1]):
        return None
    bits, over = divmod(32 * words.shape[1], columns)
    whole = not over and columns % scales.shape[1] == 0
    return bits if whole and bits in BITS else None
