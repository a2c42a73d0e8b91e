"""The compiled part of gptoss; absent where no compiler was at hand when it was installed.

Arrays are float32 and lie row after row, unless said otherwise. What does not fit is a ValueError.
"""

from collections.abc import Sequence
from typing import Any

PAGE: int  # tokens of one page of keys and values

class Weight:
    """A weight matrix [rows, columns] that shares the memory it was made from."""

    def __init__(self, data: Any, scales: Any | None, rows: int, columns: int, format: str) -> None:
        """``format``: float32, bfloat16 (as uint16) or mxfp4 (blocks, and a scale byte to each)."""

    def use_bytes(self, planes: int = 1) -> None:
        """Multiply in 8-bit integers from now on."""

    def use_twelve(self) -> bool:
        """Keep bfloat16 in twelve bits from now on, without loss, if that is smaller: whether."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...

def gather(table: Any, rows: Any, out: Any) -> None:
    """out [T, D] = table[rows], of float32 or (as uint16) bfloat16; rows int32 [T]."""

def linear(x: Any, weight: Weight, bias: Any | None, out: Any) -> None:
    """out [T, O] = x [T, i] @ weight.T + bias."""

def experts(
    x: Any,
    mlp1: Weight,
    bias1: Any,
    mlp2: Weight,
    bias2: Any,
    chosen: Any,
    share: Any,
    limit: float,
    out: Any,
) -> None:
    """out [T, D] = the chosen experts' answers to x [T, D], weighted and summed."""

def route(scores: Any, chosen: Any, share: Any) -> None:
    """chosen int32 [T, k], the best of scores [T, E]; share [T, k], the softmax over those."""

def rms_norm(x: Any, scale: Any, eps: float, out: Any) -> None:
    """out = x / sqrt(mean(x ** 2) + eps) * scale, row by row."""

def rope(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """Pairs (i, i + d/2) of x [T, H, d] turned by cos, sin [T, d/2]."""

def attend(
    q: Any,
    k: Any,
    v: Any,
    sinks: Any,
    out: Any,
    starts: Any,
    past: Any,
    tables: Sequence[Any],
    window: int,
    kept: str,
) -> None:
    """Append k, v [T, K, d] to the pages and attend q [T, H, d] to them; window 0: none."""

def page_bytes(kept: str, K: int, d: int) -> int:
    """Bytes of a page of keys and values of K heads, kept as "bfloat16" or "float32"."""

def begin_step() -> None:
    """Threads stay awake between operations."""

def end_step() -> None:
    """Threads sleep until the next operation."""

def set_threads(n: int) -> None:
    """How many threads share an operation from now on."""

def threads() -> int:
    """Threads that share an operation."""

def usable_cores() -> int:
    """Cores this process may use, by its affinity and control group."""

def isas() -> list[str]:
    """Instruction sets whose kernels this processor can run, best first."""

def isa() -> str:
    """The instruction set in use."""

def use_isa(name: str) -> None:
    """Use the kernels of another instruction set."""

def cpu_features() -> list[str]:
    """Instruction sets of this processor that kernels may be chosen by, such as 'avx2'."""

def read_bandwidth(bytes: int, passes: int) -> float:
    """Bytes in a second that all threads read of a buffer of that size; the best pass."""

def peaks(passes: int) -> list[tuple[str, float, float]]:
    """(instruction set, float32, int8): most operations in a second; 0: no kernel for it."""
