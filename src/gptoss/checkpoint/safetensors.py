"""Read ``.safetensors`` with the standard library and numpy, believing nothing in the file.

Layout: an 8-byte little-endian header length n, n bytes of JSON, then the bytes of every tensor,
in any order but without gap, overlap or remainder. Opening reads the header only; a tensor is a
read-only view into the mapped file, so its bytes are read when they are first used.

A mapped file must not shrink. Replacing it by renaming another over it is safe (the mapping keeps
the old one). Truncating it in place is noticed when a tensor is next asked for, but an array
already handed out then loses its memory, and the system ends the process (SIGBUS) where it is used.

Source: https://github.com/huggingface/safetensors#format
"""

import logging
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gptoss.checkpoint.files import POINTER, POINTER_ADVICE, open_file, parse_json, shown, some
from gptoss.errors import CheckpointError

log = logging.getLogger(__name__)

DTYPES: dict[str, npt.DTypeLike] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
}
LARGEST_HEADER = 16_000_000  # bytes; that of gpt-oss-120b has less than one million
# A tensor's entry takes three lists and dicts and at least 50 bytes. Many more of them would take
# much more memory than the file has bytes, so that many are refused before they are parsed.
BYTES_PER_CONTAINER = 16
SPARE_CONTAINERS = 20_000  # brackets in names and metadata
LARGEST_TENSOR = 1 << 62  # bytes, empty axes not counted: what numpy can index
MOST_AXES = 32
# What people give instead, by its first bytes; asked only when the header length is absurd.
FOREIGN = {
    POINTER: POINTER_ADVICE,
    b"GGUF": "this is a GGUF file. Only safetensors files are read.",
    b"PK\x03\x04": "this is a zip archive, as PyTorch saves. Only safetensors files are read.",
    b"\x80\x02": "this is a Python pickle, as PyTorch saves. Only safetensors files are read.",
    b'{"': "this is JSON, not safetensors.",
    b"<!": "this is a web page, not safetensors. The download was refused; check its address.",
}


@dataclass(frozen=True, slots=True, eq=False)
class HostTensor:
    """One tensor as stored: not decoded, not copied, not yet read."""

    name: str
    dtype: str  # as the file spells it: "BF16", "U8", ...
    shape: tuple[int, ...]
    path: Path  # the file it is in
    offset: int  # of its first byte in that file
    mapped: mmap.mmap  # that file

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def aligned(self) -> bool:
        """Whether the first byte lies where the processor likes values of this size to lie."""
        return self.offset % np.dtype(DTYPES[self.dtype]).itemsize == 0

    def array(self) -> npt.NDArray[Any]:
        """A read-only view of the mapped file; of an unaligned tensor, an aligned copy.

        Raises:
            CheckpointError: the file has shrunk since it was opened.
        """
        size = self.mapped.size()
        if size < self.offset + self.nbytes:
            raise CheckpointError(
                f"{self.path}: {shown(self.name)} ends at byte {self.offset + self.nbytes}, but "
                f"the file has shrunk to {size} since it was opened. Open it again when whole."
            )
        data = memoryview(self.mapped)[self.offset : self.offset + self.nbytes]
        view = np.ndarray(self.shape, DTYPES[self.dtype], data)
        if not self.aligned:
            view = view.copy()
            view.flags.writeable = False
        return view

    def release(self) -> None:
        """Tell the system that the bytes are not needed for now. Views of them stay valid."""
        if self.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = self.offset - self.offset % mmap.PAGESIZE
            self.mapped.madvise(
                mmap.MADV_DONTNEED, start, min(self.offset + self.nbytes, len(self.mapped)) - start
            )


def read(path: Path | str) -> dict[str, HostTensor]:
    """Map one file and return its tensors by name, in the header's order.

    Raises:
        CheckpointError: the file is damaged, incomplete or something else; the message names the
            file, the tensor and both numbers.
    """
    path = Path(path)
    file, size = open_file(path)
    with file:
        n = _header_length(path, file.read(len(POINTER)), size)
        file.seek(8)
        raw = file.read(n)
        try:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it shrank meanwhile
            raise CheckpointError(f"{path}: cannot be mapped into memory: {error}") from None
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: the header is not a JSON object; the file is damaged")
    containers = raw.count(b"{") + raw.count(b"[")
    if containers > n // BYTES_PER_CONTAINER + SPARE_CONTAINERS:
        raise CheckpointError(
            f"{path}: {containers} lists and objects in a header of {n} bytes are too many for "
            "tensors; the file is damaged"
        )
    header = parse_json(raw, f"{path}: header")
    _check_metadata(path, header.pop("__metadata__", {}))
    body = size - 8 - n
    spans = {name: _span(path, name, entry, body) for name, entry in header.items()}
    _check_tiling(path, spans, body)
    tensors = {
        name: HostTensor(name, entry["dtype"], tuple(entry["shape"]), path, 8 + n + begin, mapped)
        for (name, entry), (begin, _) in zip(header.items(), spans.values(), strict=True)
    }
    if unaligned := [t.name for t in tensors.values() if not t.aligned]:
        log.warning("%s: unaligned, so copied when read: %s", path, some(unaligned))
    return tensors


def _header_length(path: Path, head: bytes, size: int) -> int:
    if size < 8:
        raise CheckpointError(
            f"{path}: {size} bytes are too few for a safetensors file, whose first 8 give the "
            "length of its header. The download is probably incomplete."
        )
    n = int.from_bytes(head[:8], "little")
    if n > min(size - 8, LARGEST_HEADER):
        for magic, advice in FOREIGN.items():
            if head.startswith(magic):
                raise CheckpointError(f"{path}: {advice}")
        raise CheckpointError(
            f"{path}: claims a header of {n} bytes, but {size - 8} follow and the limit is "
            f"{LARGEST_HEADER}, many times what gpt-oss needs. This is no safetensors file, or its "
            "download is incomplete; compare the size with the source."
        )
    return n


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map text to text; the header is damaged")


def _span(path: Path, name: str, entry: Any, body: int) -> tuple[int, int]:
    """First and last + 1 byte of a tensor within the body, after every check on it alone."""
    where = f"{path}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where} must have dtype, shape and data_offsets, not {shown(entry)}; "
            "the header is damaged"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MOST_AXES:
        raise CheckpointError(f"{where} has the shape {shown(shape)}, which no tensor can have")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {shown(offsets)}, not [begin, end]")
    width, (begin, end) = np.dtype(DTYPES[dtype]).itemsize, offsets
    want = width * math.prod(shape)
    if width * math.prod(axis for axis in shape if axis) > LARGEST_TENSOR:
        raise CheckpointError(f"{where} has the shape {shown(shape)}, larger than any memory")
    if want != end - begin or end > body:
        raise CheckpointError(
            f"{where} is {dtype}{shape} and needs {want} bytes, but the header gives it bytes "
            f"{begin} to {end} of the {body} that follow. The file is incomplete or damaged."
        )
    return begin, end


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_tiling(path: Path, spans: dict[str, tuple[int, int]], body: int) -> None:
    """The tensors cover the body: nothing twice, nothing left over."""
    filled, before = 0, "the header"
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != filled:
            fault = "overlaps" if begin < filled else "leaves a hole after"
            raise CheckpointError(
                f"{path}: {shown(name)} begins at byte {begin} and {fault} {shown(before)}, which "
                f"ends at {filled}. The header is damaged."
            )
        filled, before = end, name
    if filled != body:
        raise CheckpointError(
            f"{path}: the tensors end at byte {filled}, but {body} bytes follow the header. "
            "The file is damaged."
        )
