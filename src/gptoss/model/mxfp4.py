"""MXFP4: four-bit floats in blocks of 32 that share a power of two.

A block of 32 values along a matrix's input dimension is 16 bytes of nibbles (the LOW nibble is the
even index) and one scale byte. A nibble is sign, two bits of exponent and one of mantissa; the
scale s stands for ``2 ** (s - 127)``. Several pairs of scale and nibble give the same value, so
what a round trip keeps is values, not bytes.

Specification: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (FP4 E2M1) and 5.4.1 (E8M0).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Rule = Literal["floor", "ceil", "least_squares"]
RULES: tuple[str, ...] = get_args(Rule)

BLOCK = 32  # values that share a scale
BIAS = 127  # of the scale byte; 255 is the specification's NaN
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([CODES[np.arange(256) & 15], CODES[np.arange(256) >> 4]], -1)  # byte -> two values
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)  # between magnitudes


@dataclass(frozen=True, slots=True)
class Packed:
    """A stack of matrices as stored. Indexing goes into the stack and copies nothing."""

    blocks: Bytes  # [..., rows, columns / 32, 16]
    scales: Bytes  # [..., rows, columns / 32]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers that are packed: [..., rows, columns]."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.blocks.nbytes + self.scales.nbytes

    def __getitem__(self, index: Any) -> "Packed":
        return Packed(self.blocks[index], self.scales[index])

    def decode(self, dtype: Any = np.float32) -> npt.NDArray[Any]:
        """The numbers, exactly (in bfloat16 too), except where a scale leaves the dtype's range."""
        return decode(self.blocks, self.scales, dtype)


def decode(blocks: Bytes, scales: Bytes, dtype: Any = np.float32) -> npt.NDArray[Any]:
    """[..., G, 16] nibbles and [..., G] scales -> [..., G * 32] numbers."""
    exponent = scales.astype(np.int32) - BIAS
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    with np.errstate(over="ignore"):  # 6 * 2**127 is infinite in float32, and so is 2**128
        unit = np.where(scales == 255, wide(np.nan), np.ldexp(wide(1), exponent))  # [..., G]
        values = PAIRS[blocks].reshape(*scales.shape, BLOCK) * unit[..., None]
    return values.reshape(*scales.shape[:-1], -1).astype(dtype, copy=False)


def encode(x: npt.NDArray[Any], rule: Rule = "least_squares") -> Packed:
    """Numbers [..., rows, columns] -> ``Packed``; columns must be a multiple of 32.

    A block whose values all have the released form is kept exactly under every rule. Otherwise:

    * ``floor``: the specification's scale, ``2 ** floor(log2(max / 4))``; the largest value
      saturates (a maximum of 7.9 becomes 6).
    * ``ceil``: the smallest scale under which nothing saturates.
    * ``least_squares``: of those two and the next finer one, the one with the least squared error.

    Raises:
        ValueError: an unknown rule, columns not a multiple of 32, or a value that is not finite.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if x.shape[-1] % BLOCK:
        raise ValueError(f"MXFP4 packs blocks of {BLOCK}, but the rows have {x.shape[-1]} columns")
    groups = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, BLOCK)
    peak = np.abs(groups).max(axis=-1)  # [..., G]
    if not np.isfinite(peak).all():
        raise ValueError("MXFP4 has no infinity and no NaN, but the values to pack do")
    floor = np.frexp(peak)[1] - 3  # 4 <= peak / 2**floor < 8; frexp's mantissa is in [0.5, 1)
    ceil = floor + (np.ldexp(peak, -floor) > 6.0)
    candidates = {"floor": [floor], "ceil": [ceil], "least_squares": [ceil, floor, floor - 1]}[rule]
    best, codes, least = ceil, np.zeros(groups.shape, np.uint8), np.full(peak.shape, np.inf)
    for exponent in candidates:
        exponent = np.where(peak > 0, np.clip(exponent, -BIAS, BIAS), 0)
        trial = _nearest(np.ldexp(groups, -exponent[..., None]))
        error = np.ldexp(CODES[trial].astype(np.float64), exponent[..., None]) - groups
        squared = (error * error).sum(axis=-1)
        better = squared < least
        best, least = np.where(better, exponent, best), np.where(better, squared, least)
        codes = np.where(better[..., None], trial, codes)
    pairs = codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))
    return Packed(pairs, (best + BIAS).astype(np.uint8))


def _nearest(x: npt.NDArray[np.float32]) -> Bytes:
    """The nibble of the nearest value; of two equally near, the one with an even mantissa."""
    magnitude = np.abs(x)
    below = np.searchsorted(MIDPOINTS, magnitude, side="left").astype(np.uint8)
    tie = (magnitude == MIDPOINTS[np.minimum(below, 6)]) & (below % 2 == 1)
    code: Bytes = (below + tie) | (np.signbit(x).astype(np.uint8) << np.uint8(3))
    return code
