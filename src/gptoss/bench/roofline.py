"""What the machine can do at most, measured beside what a model gets of it.

The compiled core reads a buffer and multiplies registers with all its threads. Without the core
NumPy stands in: its bandwidth is one thread's, its peak that of its matrix product, and neither is
the machine's limit.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

BUFFER = 256 << 20  # bytes read at least
LARGEST = 1 << 30
PASSES = 5  # of which the best counts
CACHES = Path("/sys/devices/system/cpu")
Kind = Literal["float32", "int8"]


class Roofline:
    """The best of all measurements so far: bytes and operations in a second."""

    def __init__(self) -> None:
        self.core = _core()
        self.source = "core" if self.core else "numpy"
        self.bandwidths: list[float] = []  # one for each measurement
        self.peaks: dict[str, dict[Kind, float]] = {}  # by instruction set; only what was measured

    def measure(self) -> None:
        """Takes a few tenths of a second."""
        if self.core:
            self.bandwidths.append(self.core.read_bandwidth(buffer_size(), PASSES))
            for isa, float32, int8 in self.core.peaks(PASSES):
                self._keep(isa, "float32", float32)
                if int8:
                    self._keep(isa, "int8", int8)
        else:
            self.bandwidths.append(numpy_bandwidth())
            self._keep("numpy", "float32", numpy_peak())

    @property
    def bandwidth(self) -> float:
        """Bytes in a second."""
        return max(self.bandwidths)

    def peak(self, kind: Kind) -> tuple[str, float] | None:
        """The instruction set that does the most operations of a kind, and how many; None: unknown.

        Of equals, the one that needs least.
        """
        rates = {isa: kinds[kind] for isa, kinds in self.peaks.items() if kind in kinds}
        return max(rates.items(), key=lambda pair: pair[1], default=None)

    def _keep(self, isa: str, kind: Kind, rate: float) -> None:
        kinds = self.peaks.setdefault(isa, {})
        kinds[kind] = max(rate, kinds.get(kind, 0.0))


def buffer_size() -> int:
    """Much more than the last caches hold."""
    return min(LARGEST, max(BUFFER, 4 * last_caches()))


def last_caches() -> int:
    """Bytes of all caches of the third level together; 0 where the system does not say."""
    caches = {}
    for folder in CACHES.glob("cpu[0-9]*/cache/index3"):
        try:
            kilobytes = (folder / "size").read_text().strip().removesuffix("K")
            caches[(folder / "shared_cpu_list").read_text()] = int(kilobytes) << 10
        except (OSError, ValueError):
            continue
    return sum(caches.values())


def numpy_bandwidth() -> float:
    """Bytes in a second that ``np.sum`` reads."""
    x = np.ones(BUFFER // 8)
    return x.nbytes / best(lambda: x.sum())


def numpy_peak() -> float:
    """Operations in a second of a float32 matrix product."""
    n = 1024
    x = np.ones((n, n), np.float32)
    return 2 * n**3 / best(lambda: x @ x)


def best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some runs."""
    runs = []
    for _ in range(PASSES):
        started = time.perf_counter()
        work()
        runs.append(time.perf_counter() - started)
    return min(runs)


def _core() -> Any:
    """The compiled core, or None if it is not there or is older than this file."""
    try:
        from gptoss import _core as core
    except ImportError:
        return None
    return core if hasattr(core, "read_bandwidth") and hasattr(core, "peaks") else None
