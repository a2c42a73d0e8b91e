"""What loading a model will take, worked out from its headers and said before a byte is loaded."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from gptoss.backends import NAMES
from gptoss.checkpoint.open import Checkpoint
from gptoss.engine.generate import STEP_TOKENS
from gptoss.errors import GptOssError
from gptoss.llm.memory import available_memory
from gptoss.model.config import ModelConfig
from gptoss.model.weights import specs

ROOM = 16_384  # tokens of prompt and answer, unless more is asked for
TINY = 50_000_000  # parameters up to which starting torch takes longer than answering
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
GIVEN = "as asked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes of memory, estimated."""

    weights: int
    cache: int  # keys and values of max_tokens
    working: int  # the largest step's intermediate values

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.cache + self.working


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a checkpoint will be run, why so, and what that takes."""

    path: Path
    layout: str
    disk_bytes: int
    backend: str
    dtype: str
    device: str
    reason: str  # why this backend
    max_tokens: int  # room for prompt and answer
    needs: Needs
    available: int | None  # bytes of memory; None: unknown

    def __str__(self) -> str:
        have = "unknown" if self.available is None else f"{size(self.available)} free"
        return (
            f"{self.path}: {self.layout} layout, {size(self.disk_bytes)} on disk; "
            f"{self.backend} backend in {self.dtype} on {self.device} ({self.reason})\n"
            f"memory: {size(self.needs.total)} = weights {size(self.needs.weights)} + cache "
            f"{size(self.needs.cache)} for {self.max_tokens} tokens + working memory "
            f"{size(self.needs.working)}; {have}"
        )

    def check(self) -> None:
        """Raises GptOssError when it cannot fit."""
        if self.available is not None and self.needs.total > self.available:
            raise GptOssError(
                f"{self.path} needs about {size(self.needs.total)} of memory to run, but "
                f"{size(self.available)} are free. {self._advice()}"
            )

    def _advice(self) -> str:
        less = self.needs.total - self.needs.cache - self.needs.working // 2
        if self.available is not None and less < self.available:
            return "Lower max_tokens (--context), or load with force=True (--force) to try anyway."
        return (
            "Free memory, take a smaller model or dtype, or load with force=True (--force) to try "
            "anyway."
        )


def make_plan(
    checkpoint: Checkpoint,
    *,
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    max_tokens: int | None = None,
) -> Plan:
    """Decide what was left open. Raises ValueError for what no backend is, takes or holds."""
    config = checkpoint.config
    chosen, where, reason = choose(config, backend, device)
    kind = dtype or ("float32" if chosen == "reference" else "bfloat16")
    if kind not in BYTES:
        raise ValueError(f"unknown dtype {kind!r}; one of {', '.join(BYTES)}")
    if chosen == "reference" and kind == "bfloat16":
        raise ValueError("the reference computes in float32 or float64, not bfloat16")
    room = min(ROOM, config.context_length) if max_tokens is None else max_tokens
    if not 1 <= room <= config.context_length:
        raise ValueError(
            f"max_tokens (--context) must be in 1..{config.context_length}, not {room}"
        )
    return Plan(
        path=checkpoint.path,
        layout=checkpoint.layout.name,
        disk_bytes=checkpoint.nbytes,
        backend=chosen,
        dtype=kind,
        device=where,
        reason=reason,
        max_tokens=room,
        needs=estimate(config, chosen, kind, room, packed=checkpoint.layout.packed),
        available=_free(where),
    )


def choose(config: ModelConfig, backend: str, device: str | None) -> tuple[str, str, str]:
    """Backend, device, and why.

    A tiny model answers before torch has been imported, so it runs on NumPy. Others run on torch
    where there is one: on a GPU if it has one, else on the CPU in bfloat16, which halves the bytes
    that every token has to read.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"unknown backend {backend!r}; one of auto, {', '.join(NAMES)}")
    if backend == "reference":
        if device not in (None, "cpu"):
            raise ValueError(f"the reference runs on the cpu, not on {device!r}")
        return backend, "cpu", GIVEN
    if backend == "auto" and device in (None, "cpu") and parameters(config) <= TINY:
        return "reference", "cpu", "a model this small answers before torch has started"
    if importlib.util.find_spec("torch") is None:
        if backend == "auto" and device in (None, "cpu"):
            return "reference", "cpu", "torch is not installed; with it this would be faster"
        return "torch", device or "cpu", GIVEN  # the room will say what it lacks
    why = GIVEN if backend != "auto" else "torch is installed"
    if device is not None:
        return "torch", device, why
    if _free("cuda") is not None:
        return "torch", "cuda", f"{why}, with a GPU"
    return "torch", "cpu", why


def estimate(
    config: ModelConfig, backend: str, dtype: str, max_tokens: int, *, packed: bool = True
) -> Needs:
    """Memory by the shapes alone. Experts stay as stored, except that the reference widens those
    of a small model; the rest is in the compute dtype.
    """
    from gptoss.backends.reference.backend import SMALL  # the room is opened only when asked

    c, width, step = config, BYTES[dtype], min(STEP_TOKENS, max_tokens)
    numpy = backend == "reference"
    dense, experts = counts(config)
    widened = numpy and experts * width <= SMALL
    expert_width = width if widened else 17 / 32 if packed else 2
    held = [
        max_tokens
        if numpy or (window := c.window(i)) is None  # the reference forgets nothing
        else min(max_tokens, window + step)
        for i in range(c.num_hidden_layers)
    ]
    heads, d, F = c.num_attention_heads, c.head_dim, c.intermediate_size
    decoded = 3 * F * c.hidden_size * width * 3  # one expert, and what its decoding passes through
    scores = 3 * heads * step * max_tokens * width if numpy else step * max_tokens * 4
    repeated = 2 * max_tokens * heads * d * width if numpy else 0
    return Needs(
        weights=round(dense * width + experts * expert_width),
        cache=sum(held) * 2 * c.num_key_value_heads * d * width,
        working=decoded + scores + repeated + 8 * step * c.hidden_size * width + 32 * c.vocab_size,
    )


def counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters outside and inside the experts' matrices."""
    sums = {"dense": 0, "expert": 0}
    for spec in specs(config):
        sums[spec.kind] += math.prod(spec.shape)
    return sums["dense"], sums["expert"]


def parameters(config: ModelConfig) -> int:
    """All of them."""
    return sum(counts(config))


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _free(device: str) -> int | None:
    """Free memory where the weights will lie; None: unknown, or no such device."""
    if device == "cpu":
        return available_memory()
    if device.startswith("cuda") and importlib.util.find_spec("torch") is not None:
        from gptoss.backends.torch.memory import free_memory

        return free_memory(device)
    return None
