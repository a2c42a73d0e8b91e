"""How a layout spells the canonical tensors: one table, read from left to right when opening a
checkpoint and from right to left when writing one.

A layout never computes. It renames, slices rows, takes every other one, views a transpose, or takes
one half of a packed pair; what cannot be said in those words is no layout of gpt-oss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gptoss.model.config import ModelConfig

Part = Literal["whole", "rows", "transposed", "blocks", "scales", "words", "half"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file, and the part of a canonical tensor that it holds."""

    name: str  # as the file calls it
    shape: tuple[int, ...]  # as the file stores it
    canonical: str  # the canonical tensor it belongs to (model/weights.py)
    part: Part
    rows: tuple[int, int] = (0, 0)  # for "rows": first and last + 1 of the canonical rows
    half: int | None = None  # of the rows of experts: even ones 0, odd ones 1; None: all

    @property
    def dtype(self) -> str:
        """What is written: bfloat16, or raw bytes (or words of four) for the halves of MXFP4."""
        return {"blocks": "U8", "scales": "U8", "words": "U32"}.get(self.part, "BF16")


@dataclass(frozen=True, slots=True)
class Layout:
    """One way the field stores gpt-oss."""

    name: str  # "original", "huggingface" (packed), "huggingface-bf16" or "mlx"
    packed: bool  # experts are MXFP4
    entries: Callable[[ModelConfig], list[Entry]]
