"""What loading a model will take, worked out from its headers and said before a byte is loaded."""

import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from gptoss.backends import NAMES, check_options, has_native, is_narrow
from gptoss.checkpoint.open import Checkpoint
from gptoss.engine import STEP_TOKENS
from gptoss.errors import GptOssError
from gptoss.llm.memory import available_memory
from gptoss.llm.needs import BYTES, NATIVE_CHUNK, Needs, estimate, kept, parameters
from gptoss.model.config import ModelConfig

ROOM = 16_384  # tokens of prompt and answer, unless more is asked for
TINY = 50_000_000  # parameters up to which starting torch takes longer than answering
RESERVE = 1_500_000_000  # bytes left to the system and its file cache while experts are on disk
# Tokens of a prompt computed together while experts are on disk: each step reads them all.
DISK_STEP = 2048
GIVEN = "as asked"
MEANING = {
    "exact": "weights as published",
    "fast": "dense matrices in 8 bits",
    "small": "dense matrices in 4 bits",
}
# What a GPU's driver leaves on Linux: NVIDIA's, AMD's, Windows' below it.
DRIVERS = [Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a checkpoint will be run, why so, and what that takes."""

    path: Path
    layout: str
    disk_bytes: int
    backend: str
    dtype: str | None  # None: native has a precision instead
    precision: str | None  # of native and mlx
    device: str
    threads: int | None  # None: the backend's choice
    reason: str  # why this backend
    max_tokens: int  # room for prompt and answer of one conversation
    needs: Needs
    available: int | None  # bytes of memory; None: unknown
    conversations: int = 1  # whose room the cache has
    kv: str | None = None  # how native keeps keys and values
    integers: bool = False  # whether experts are multiplied in integers
    resident: int | None = None  # bytes of experts in memory, the others on disk; None: all
    step_tokens: int = STEP_TOKENS  # of a prompt, computed together

    @property
    def total(self) -> int:
        """Bytes of memory that it takes."""
        on_disk = 0 if self.resident is None else self.needs.mapped - self.resident
        return self.needs.total - on_disk

    def __str__(self) -> str:
        have = "unknown" if self.available is None else f"{size(self.available)} free"
        numbers = self.dtype or ""
        if self.precision is not None:
            numbers += ", " * (self.dtype is not None)
            numbers += f"{self.precision} precision ({MEANING[self.precision]})"
        threads = f", {self.threads} threads" if self.threads is not None else ""
        needs, on_disk, kv = self.needs, "", f" in {self.kv}" if self.kv else ""
        many = f"{self.conversations} x " if self.conversations > 1 else ""
        room = f"{many}{self.max_tokens} tokens{kv}"
        if self.resident is not None:
            on_disk = (
                f"\nexperts stay on disk, at most {size(self.resident)} of their "
                f"{size(needs.mapped)} in memory; expect {size(needs.visited)} read per token at "
                "worst"
            )
        return (
            f"{self.path}: {self.layout} layout, {size(self.disk_bytes)} on disk; "
            f"{self.backend} backend in {numbers} on {self.device}{threads} ({self.reason})\n"
            f"memory: {size(self.total)} = weights "
            f"{size(self.total - needs.cache - needs.working)} + cache {size(needs.cache)} for "
            f"{room} + working memory {size(needs.working)}; {have}{on_disk}"
        )

    def check(self) -> None:
        """Raises GptOssError when it cannot fit."""
        if self.available is not None and self.total > self.available:
            least = self.needs.least + RESERVE
            on_disk = f", or {size(least)} with its experts on disk" if least < self.total else ""
            raise GptOssError(
                f"{self.path} needs about {size(self.total)} of memory to run{on_disk}, but "
                f"{size(self.available)} are free. {self._advice()}"
            )

    def _advice(self) -> str:
        less = self.needs.total - self.needs.cache - self.needs.working // 2
        if self.available is not None and less < self.available:
            return "Lower max_tokens (--context), or load with force=True (--force) to try anyway."
        return (
            "Free memory, take a smaller model or coarser numbers (--precision, --dtype), or load "
            "with force=True (--force) to try anyway."
        )


def make_plan(
    checkpoint: Checkpoint,
    *,
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    kv: str | None = None,
    memory: int | None = None,
    max_tokens: int | None = None,
    conversations: int = 1,
) -> Plan:
    """Decide what was left open. Raises ValueError for what no backend is, takes or holds."""
    config = checkpoint.config
    native = any(given is not None for given in (precision, threads, kv, memory))
    chosen, where, reason = choose(config, backend, device, dtype=dtype, native=native)
    check_options(chosen, dtype=dtype, precision=precision, threads=threads, kv=kv, memory=memory)
    if chosen == "native":
        numbers = precision = "exact" if is_narrow(config) else precision or "fast"
        kv = kept(config, precision, kv)
    else:
        wide = chosen == "reference" or (chosen == "mlx" and is_narrow(config))
        numbers = dtype = dtype or ("float32" if wide else "bfloat16")
        if numbers not in BYTES:
            raise ValueError(f"unknown dtype {numbers!r}; one of {', '.join(BYTES)}")
        if chosen == "reference" and numbers == "bfloat16":
            raise ValueError("the reference computes in float32 or float64, not bfloat16")
        if chosen == "mlx" and numbers == "float64":
            raise ValueError("mlx computes in float32 or bfloat16, not float64")
        precision = (precision or "exact") if chosen == "mlx" else None
    room = min(ROOM, config.context_length) if max_tokens is None else max_tokens
    if not 1 <= room <= config.context_length:
        raise ValueError(
            f"max_tokens (--context) must be in 1..{config.context_length}, not {room}"
        )
    if conversations < 1:
        raise ValueError(f"conversations must be at least 1, not {conversations}")
    available, packed = _free(where), checkpoint.layout.packed
    step = NATIVE_CHUNK if chosen == "native" else STEP_TOKENS

    def needed(step: int) -> Needs:
        return estimate(
            config,
            chosen,
            numbers,
            room,
            packed=packed,
            step=step,
            kv=kv,
            conversations=conversations,
            precision=precision,
        )

    needs = needed(step)
    resident = share(needs, available, memory)
    if resident is not None:
        long = needed(DISK_STEP)
        left = resident - (long.total - needs.total)
        if left >= needs.layer:
            needs, resident, step = long, left, DISK_STEP
    return Plan(
        path=checkpoint.path,
        layout=checkpoint.layout.name,
        disk_bytes=checkpoint.nbytes,
        backend=chosen,
        dtype=dtype,
        precision=precision,
        kv=kv,
        integers=chosen == "native" and packed and not is_narrow(config),
        device=where,
        threads=threads,
        reason=reason,
        max_tokens=room,
        conversations=conversations,
        needs=needs,
        available=available,
        resident=resident,
        step_tokens=step,
    )


def share(needs: Needs, available: int | None, memory: int | None) -> int | None:
    """Bytes of experts to keep in memory at a time; None: all of them, or there is no such way.

    Args:
        memory: what the whole model may take; None: what is available, less ``RESERVE`` where
            that is too little for all.

    Raises:
        ValueError: in so little memory it cannot run.
    """
    if memory is not None and memory < needs.least:
        raise ValueError(
            f"memory (--memory) must be at least {size(needs.least)} for this model, "
            f"not {size(memory)}"
        )
    room = needs.total if memory is None else memory
    if available is not None and available < needs.total:
        room = min(room, available - RESERVE)
    if not needs.least <= room < needs.total:
        return None
    return room - (needs.total - needs.mapped)


def choose(
    config: ModelConfig,
    backend: str,
    device: str | None,
    *,
    dtype: str | None = None,
    native: bool = False,
) -> tuple[str, str, str]:
    """Backend, device, and why. ``native``: something is asked that only that backend has.

    A GPU first, for what is not tiny (on a Mac by MLX); then the compiled core, which starts at
    once; without it, or in a dtype, torch, and NumPy for a tiny model, which answers before torch
    has been imported.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"unknown backend {backend!r}; one of auto, {', '.join(NAMES)}")
    if backend in ("reference", "native"):
        if device not in (None, "cpu"):
            raise ValueError(f"the {backend} backend runs on the cpu, not on {device!r}")
        return backend, "cpu", GIVEN
    if backend == "mlx" or (backend == "auto" and device == "gpu"):
        return "mlx", device or ("gpu" if _apple() else "cpu"), GIVEN
    if backend == "torch" or device not in (None, "cpu"):
        return "torch", device or ("cuda" if _gpu() else "cpu"), GIVEN
    if native:
        return "native", "cpu", "precision, threads, kv and memory are its own"
    tiny = parameters(config) <= TINY
    if not tiny and device is None and dtype != "float64" and _apple():
        return "mlx", "gpu", "MLX is installed, with Apple's GPU"
    if not tiny and device is None and _gpu():
        return "torch", "cuda", "torch is installed, with a GPU"
    if dtype is None and has_native():
        return "native", "cpu", "the fastest on a CPU"
    lacking = "native has no dtype" if dtype is not None else "there is no compiled core"
    if tiny:
        return "reference", "cpu", f"{lacking}; a model this small answers before torch has started"
    if importlib.util.find_spec("torch") is None:
        return "reference", "cpu", f"{lacking} and torch is not installed; either is faster"
    return "torch", "cpu", f"{lacking}; torch is installed"


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _apple() -> bool:
    """Whether MLX is here, on a Mac whose GPU it runs on."""
    mac = sys.platform == "darwin" and platform.machine() == "arm64"
    return mac and importlib.util.find_spec("mlx") is not None


def _gpu() -> bool:
    """Whether torch is here and has a GPU. It is not imported where no driver is: that is slow."""
    if sys.platform == "linux" and not any(path.exists() for path in DRIVERS):
        return False
    return _free("cuda") is not None


def _free(device: str) -> int | None:
    """Free memory where the weights will lie; None: unknown, or no such device."""
    if device in ("cpu", "gpu"):  # a Mac's GPU shares the memory
        return available_memory()
    if device.startswith("cuda") and importlib.util.find_spec("torch") is not None:
        from gptoss.backends.torch.memory import free_memory

        return free_memory(device)
    return None
