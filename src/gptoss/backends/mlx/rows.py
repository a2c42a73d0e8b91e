"""A row of a cache as a file: a long prompt is read once, and gone on with on another day.

A file belongs to a model and to the way it is kept; it says the config and the tokens, not the
weights. It is a safetensors file, read with the suspicion that checkpoints are read with.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from gptoss.backends.mlx.cache import MlxCache, Strip
from gptoss.checkpoint import safetensors
from gptoss.errors import CheckpointError


def save_row(cache: MlxCache, slot: int, tokens: Sequence[int], path: Path | str) -> None:
    """Write the row in ``slot``, which holds ``tokens``; what was at ``path`` is replaced.

    Raises:
        ValueError: it holds another number of tokens.
        OSError: it cannot be written; what was there stays.
    """
    strips = cache.strips[slot]
    if strips[0].length != len(tokens) or not len(tokens):
        raise ValueError(f"the row holds {strips[0].length} tokens, not {len(tokens)}, or none")
    arrays = {
        f"{i}.{j}": mx.contiguous(x[:, :, : strip.held])
        for i, strip in enumerate(strips)
        for j, x in enumerate(strip.parts)
    }
    arrays["tokens"] = mx.array(np.asarray(tokens, np.int32))
    arrays["config"] = mx.array(np.frombuffer(_config(cache), np.uint8))
    partial = Path(f"{path}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(partial), arrays, {"format": "mlx"})
        os.replace(partial, path)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_row(cache: MlxCache, path: Path | str) -> tuple[int, list[int]]:
    """A new slot with the row that ``save_row`` wrote, and its tokens.

    Raises:
        CheckpointError: the file is damaged, of another model, or of another kind of cache.
        CacheFull: there is no room for so many tokens.
    """
    arrays = {name: tensor.array() for name, tensor in safetensors.read(path).items()}
    tokens, config = arrays.pop("tokens", np.zeros(0)), arrays.pop("config", np.zeros(0))
    if tokens.dtype != np.int32 or tokens.ndim != 1 or config.tobytes() != _config(cache):
        raise CheckpointError(f"{path}: not a row of this model's cache, kept as it is kept here")
    layers, parts, length = cache.config.num_hidden_layers, len(cache.empty), len(tokens)
    strips = []
    for i in range(layers):
        window = cache.config.window(i)
        found = [arrays.pop(f"{i}.{j}", np.zeros(0)) for j in range(parts)]
        held = found[0].shape[2] if found[0].ndim == 4 else 0
        least = length if window is None else min(length, window - 1)
        fits = [
            x.shape == (*empty.shape[:2], held, empty.shape[3]) and mx.array(x).dtype == empty.dtype
            for x, empty in zip(found, cache.empty, strict=True)
        ]
        if not (all(fits) and length > 0 and least <= held <= length):
            raise CheckpointError(f"{path}: the keys and values of layer {i} are damaged")
        strips.append(Strip([mx.array(x) for x in found], window, length - held, length))
    if arrays:
        raise CheckpointError(f"{path}: holds what no row of a cache has: {sorted(arrays)[:3]}")
    slot = cache.open()
    try:
        cache.reserve(slot, length)
    except BaseException:
        cache.close(slot)
        raise
    cache.strips[slot] = strips
    return slot, [int(token) for token in tokens]


def _config(cache: MlxCache) -> bytes:
    """What a row is meaningless without."""
    kept = {"dtype": str(cache.dtype), "group": cache.group}
    return json.dumps(asdict(cache.config) | kept, sort_keys=True).encode()
