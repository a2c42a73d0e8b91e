"""A random checkpoint of any size in any layout, for work that needs the bytes but not the answers.

Activations neither vanish nor explode however deep the model is: every matrix has a standard
deviation near 1 / sqrt(its columns), so that what RMSNorm makes one stays near one. The same seed
gives equal values in every layout. Experts are drawn as MXFP4, never encoded; everything is
random integers looked up in a table, because drawing must not be slower than a disk.
"""

import math
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.checkpoint.pieces import BF16
from gptoss.checkpoint.save import SHARD, Progress, save
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BIAS, BLOCK, MIDPOINTS, PAIRS, Bytes, Packed
from gptoss.model.weights import Spec, Stored, specs

DRAW = 1 << 20  # bytes drawn at a time: what a processor's cache holds
WIDTH = 2.5  # of the bell curve behind the nibbles, in their units: 32 of them peak near 6
# Standard deviation times sqrt(columns), by the tail of the canonical name.
GAIN = {
    "qkv.weight": 1.0,
    "out.weight": 0.5,
    "gate.weight": 1.0,
    "mlp1_weight": 1.0,
    "mlp2_weight": 0.5,
    "unembedding.weight": 2.0,  # so this is the logits' standard deviation
}
# Standard deviation of what is no product's factor.
SPREAD = {"embedding.weight": 1.0, "norm.scale": 0.1, "sinks": 1.0, "bias": 0.1}


def synthesize(
    config: ModelConfig,
    path: Path | str,
    layout: str = "huggingface",
    *,
    seed: int = 0,
    tokenizer_path: Path | str | None = None,
    shard_bytes: int | None = SHARD,
    progress: Progress | None = None,
) -> Path:
    """Write a random, well-behaved checkpoint. Arguments and errors as ``save``."""
    return save(
        config,
        reader(config, seed),
        path,
        layout,
        tokenizer_path=tokenizer_path,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def reader(config: ModelConfig, seed: int = 0) -> Callable[[str], Stored]:
    """The same tensors without a file: canonical name -> values, drawn when asked for.

    Raises:
        ValueError: columns that are no multiple of 32, which MXFP4 cannot hold.
    """
    table = {spec.name: spec for spec in specs(config)}
    for spec in table.values():
        if spec.kind == "expert" and spec.shape[-1] % BLOCK:
            raise ValueError(f"{spec.name} has {spec.shape[-1]} columns, not a multiple of {BLOCK}")
    return lambda name: _tensor(table[name], seed)


def _tensor(spec: Spec, seed: int) -> Stored:
    rng = np.random.SFC64([seed, zlib.crc32(spec.name.encode())])
    if spec.kind == "expert":
        return _packed(rng, spec.shape, _spread(spec))
    return _normal(rng, spec.shape, _spread(spec), mean=float(spec.name.endswith("norm.scale")))


def _spread(spec: Spec) -> float:
    for tail, gain in GAIN.items():
        if spec.name.endswith(tail):
            return gain / math.sqrt(spec.shape[-1])
    return next(spread for tail, spread in SPREAD.items() if spec.name.endswith(tail))


def _normal(
    rng: np.random.SFC64, shape: tuple[int, ...], spread: float, mean: float
) -> npt.NDArray[Any]:
    """bfloat16 from a normal distribution cut at 4.3 standard deviations, its 65536-quantiles."""
    table = (_quantiles() * spread + mean).astype(BF16)
    out = np.empty(math.prod(shape), BF16)
    for i in range(0, out.size, DRAW // 2):
        piece = out[i : i + DRAW // 2]
        piece[:] = table[_raw(rng, piece.nbytes).view(np.uint16)]
    return out.reshape(shape)


def _packed(rng: np.random.SFC64, shape: tuple[int, ...], spread: float) -> Packed:
    """Nibbles as rounding a normal distribution gives them, and two scales in such proportion that
    the values have the standard deviation ``spread``.
    """
    nibbles = _nibbles()
    square = spread**2 / float((PAIRS[nibbles].astype(np.float64) ** 2).mean())
    exponent = math.floor(math.log2(square) / 2)
    doubled = round(256 * (square / 4**exponent - 1) / 3)  # of 256 blocks, have the next scale
    scales = (BIAS + exponent + (np.arange(256) < doubled)).astype(np.uint8)
    grouped = (*shape[:-1], shape[-1] // BLOCK)
    return Packed(
        _looked_up(rng, nibbles, (*grouped, BLOCK // 2)), _looked_up(rng, scales, grouped)
    )


def _looked_up(rng: np.random.SFC64, table: Bytes, shape: tuple[int, ...]) -> Bytes:
    out = np.empty(math.prod(shape), np.uint8)
    for i in range(0, out.size, DRAW):
        piece = out[i : i + DRAW]
        # Three times as fast as indexing, and nearly as fast as the memory.
        drawn = _raw(rng, piece.size).tobytes().translate(table.tobytes())
        piece[:] = np.frombuffer(drawn, np.uint8)
    return out.reshape(shape)


def _raw(rng: np.random.SFC64, nbytes: int) -> Bytes:
    drawn: Bytes = rng.random_raw(-(-nbytes // 8)).view(np.uint8)[:nbytes]
    return drawn


@cache
def _quantiles() -> npt.NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])


@cache
def _nibbles() -> Bytes:
    """256 bytes, each two nibbles, as often as two normal values would round to them."""
    edges = [0.0, *map(float, MIDPOINTS), math.inf]
    reached = np.array([NormalDist(0, WIDTH).cdf(edge) for edge in edges])
    share = 2 * np.diff(reached)  # of each magnitude
    wanted = np.outer(share, share).ravel() * 64
    times = wanted.astype(int)
    largest = np.argsort(times - wanted, kind="stable")  # remainders, the largest first
    times[largest[: 64 - times.sum()]] += 1
    high, low = np.divmod(np.repeat(np.arange(64), times), 8)
    signs = np.array([0x00, 0x08, 0x80, 0x88])
    table: Bytes = ((high << 4 | low)[:, None] | signs).astype(np.uint8).ravel()
    return table
