"""GGUF files for llama.cpp: written a piece at a time, never read.

A file is a table of typed keys, a table of tensors and the tensors, each at a multiple of 32 bytes.
All sizes follow from the config, so both tables are written first. The first four bytes, without
which nothing opens the file, are written last.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from gptoss.checkpoint import pieces, staged
from gptoss.checkpoint.llamacpp import Dense, Tensor, check, metadata, tensors, vocabulary
from gptoss.checkpoint.open import Checkpoint, open_checkpoint
from gptoss.errors import CheckpointError
from gptoss.model.mxfp4 import BLOCK, RULES, Packed, Rule, encode
from gptoss.model.weights import Stored
from gptoss.text.tokenizer import HARMONY_SPECIALS, Tokenizer

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # bytes of tensors written, bytes in all

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
O200K_SIZE = max(HARMONY_SPECIALS.values()) + 1
# How the format numbers what a key holds, and how a tensor is stored.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NUMBERS = {"F32": 0, "Q8_0": 8, "BF16": 30, "MXFP4": 39}
BYTES = {"F32": (4, 1), "Q8_0": (34, BLOCK), "BF16": (2, 1), "MXFP4": (17, BLOCK)}  # for values


def write_gguf(
    source: Path | str,
    target: Path | str,
    *,
    dense: Dense = "bf16",
    tokenizer_path: Path | str | None = None,
    rule: Rule = "least_squares",
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint at ``source`` as one GGUF, which llama.cpp runs, and return its path.

    Experts are MXFP4: those stored so keep their values, others are packed under ``rule``. The
    other matrices stay as published ("bf16") or are rounded to eight bits ("q8_0"). The tokenizer
    is the given one, the one beside the weights, or gpt-oss's own where the vocabulary is its size;
    without any, llama.cpp takes token ids only.

    Raises:
        ValueError: an unknown ``dense`` or ``rule``, or a name that does not end in .gguf.
        CheckpointError: something is at ``target`` already, the source will not do, the disk is too
            small or fails, or llama.cpp could not compute this model. Nothing is left behind.
        TokenizerError: the tokenizer is damaged.
    """
    if dense not in get_args(Dense):
        raise ValueError(f"dense must be one of {', '.join(get_args(Dense))}, not {dense!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    target = Path(target).absolute()
    if target.suffix != ".gguf":
        raise ValueError(f"the name of a GGUF ends in .gguf, not {target.name!r}")
    checkpoint = open_checkpoint(source)
    table = tensors(checkpoint.config, dense)
    try:
        check(checkpoint.config, table)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    tokenizer = _tokenizer(checkpoint, tokenizer_path)
    total = sum(map(_nbytes, table))
    with _whole(target, total) as partial, ThreadPoolExecutor(pieces.THREADS) as pool:
        keys = metadata(checkpoint.config)
        keys |= vocabulary(tokenizer, checkpoint.config.vocab_size, partial.parent)
        header = _header(keys, table)
        with partial.open("wb") as file:
            file.write(bytes(len(MAGIC)) + header[len(MAGIC) :])
            for done, piece in _running(checkpoint, table, rule, pool):
                file.write(piece.data)
                if progress is not None:
                    progress(done, total)
            assert file.tell() == len(header) + total, f"{partial}: {file.tell()} bytes"
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            file.write(MAGIC)
            file.flush()
            os.fsync(file.fileno())
    return target


def repacked(packed: Packed) -> Bytes:
    """As GGUF stores MXFP4: [..., rows, G * 17] bytes, a scale and sixteen pairs for each block.

    Byte j of the sixteen holds value j (low nibble) and value j + 16.
    """
    first, second = packed.blocks[..., :8], packed.blocks[..., 8:]
    out = np.empty((*packed.scales.shape, 17), np.uint8)
    out[..., 0] = packed.scales
    out[..., 1::2] = (first & 0x0F) | (second << 4)  # even values
    out[..., 2::2] = (first >> 4) | (second & 0xF0)
    return out.reshape(*packed.scales.shape[:-1], -1)


def q8_0(values: npt.NDArray[np.float32]) -> Bytes:
    """[..., rows, columns] -> [..., rows, G * 34] bytes, of each block a float16 scale and 32 int8.

    The scale is the largest magnitude over 127; halves are rounded away from zero, as llama.cpp
    does.

    Raises:
        ValueError: a scale that float16 cannot hold.
    """
    groups = values.reshape(*values.shape[:-1], -1, BLOCK)
    scale = np.abs(groups).max(-1) / np.float32(127)  # [..., G]
    if scale.size and scale.max() > np.finfo(np.float16).max:
        raise ValueError("a value is too large for Q8_0")
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = groups * inverse[..., None]
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    out = np.empty((*scale.shape, 34), np.uint8)
    out[..., :2] = scale.astype("<f2")[..., None].view(np.uint8)
    out[..., 2:] = rounded.view(np.uint8)
    return out.reshape(*values.shape[:-1], -1)


def _running(
    checkpoint: Checkpoint, table: list[Tensor], rule: Rule, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, Bytes]]:
    """Every tensor in pieces, each with the bytes so far, its own included."""
    done = 0
    for tensor in table:
        try:
            stored = checkpoint.read(tensor.canonical)
            if tensor.kind == "MXFP4":
                found = _experts(stored, tensor, rule, pool)
            else:
                found = _dense(stored, tensor)
            for piece in found:
                flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                done += flat.nbytes
                yield done, flat
        except ValueError as error:
            raise CheckpointError(f"{tensor.canonical}: {error}") from None
        end = -_nbytes(tensor, padded=False) % ALIGNMENT
        done += end
        yield done, np.zeros(end, np.uint8)


def _dense(stored: Stored, tensor: Tensor) -> Iterator[Array]:
    """What is no expert: bfloat16 first, as in every layout, then the kind."""
    assert isinstance(stored, np.ndarray), f"{tensor.canonical} is packed, but not an expert"
    for slab in pieces._slabs(stored[tensor.index]):
        rounded = pieces._bf16(slab, tensor.canonical)
        if tensor.kind == "BF16":
            yield rounded
        else:
            numbers = rounded.astype(np.float32)
            yield numbers if tensor.kind == "F32" else q8_0(numbers)


def _experts(
    stored: Stored, tensor: Tensor, rule: Rule, pool: ThreadPoolExecutor
) -> Iterator[Bytes]:
    """Some experts at a time, packed first where they are not."""

    def one(expert: Stored) -> Bytes:
        some = expert[tensor.index[1:]]
        if isinstance(some, Packed):
            return repacked(some)
        strips = (some[i : i + pieces.STRIP] for i in range(0, len(some), pieces.STRIP))
        return np.concatenate([repacked(encode(x, rule)) for x in strips])

    for i in range(0, stored.shape[0], pieces.THREADS):
        several = range(i, min(i + pieces.THREADS, stored.shape[0]))
        yield from pool.map(one, [stored[e] for e in several])
        pieces.forget(stored.blocks if isinstance(stored, Packed) else stored)


def _tokenizer(checkpoint: Checkpoint, path: Path | str | None) -> Tokenizer | None:
    path = path or checkpoint.tokenizer_path
    if path is not None:
        return Tokenizer.from_file(path)
    return Tokenizer.o200k_harmony() if checkpoint.config.vocab_size == O200K_SIZE else None


def _nbytes(tensor: Tensor, *, padded: bool = True) -> int:
    width, values = BYTES[tensor.kind]
    size = math.prod(tensor.shape) // values * width
    return size + -size % ALIGNMENT if padded else size


def _header(keys: dict[str, Any], table: list[Tensor]) -> bytes:
    """Everything before the tensors."""
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(table), len(keys))]
    out += [_string(name) + _value(value) for name, value in keys.items()]
    offset = 0
    for tensor in table:
        axes = tensor.shape[::-1]
        out.append(_string(tensor.name))
        out.append(struct.pack(f"<I{len(axes)}Q", len(axes), *axes))
        out.append(struct.pack("<IQ", NUMBERS[tensor.kind], offset))
        offset += _nbytes(tensor)
    header = b"".join(out)
    return header + bytes(-len(header) % ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A key's type and value."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + _string(value)
        case list():
            head = struct.pack("<IIQ", ARRAY, STRING, len(value))
            return head + b"".join(map(_string, value))
        case _:
            assert value.dtype == np.int32, value
            return struct.pack("<IIQ", ARRAY, INT32, len(value)) + bytes(value.astype("<i4"))


@contextmanager
def _whole(target: Path, needed: int) -> Iterator[Path]:
    """A file in a hidden directory beside ``target`` that takes its name if all goes well, or is
    removed; see staged.py.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: already exists; choose another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged._remove_stale(target)
        staged._check_room(target, needed)
        with staged._partial(target) as partial:
            yield partial / "unfinished"
            os.rename(partial / "unfinished", target)
    except OSError as error:
        full = error.errno in staged.FULL
        reason = "the disk is full" if full else error.strerror or str(error)
        if error.filename is not None:  # perhaps a file of the source
            reason = f"{error.filename}: {reason}"
        raise CheckpointError(
            f"{target}: could not be written: {reason}. Nothing was left behind."
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{target}: interrupted. Nothing was left behind.") from None
    with suppress(OSError):
        staged.sync(target.parent)
