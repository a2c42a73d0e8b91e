"""The narrow waist: everything the engine may ask of a backend.

The engine decides *which tokens run next*; the backend decides *how*. Between them pass only host
integers (``Batch``), opaque device logits, and slot numbers. There is no prefill/decode split: a
prefill is a batch whose rows are long, a decode is a batch whose rows are one token, and a chunked
prefill riding along with decodes is just a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gptoss.errors import ContextExceeded
from gptoss.model.config import ModelConfig
from gptoss.model.model import Trace

Logits = Any  # [W, V] on the backend's device; the engine only passes it back
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: R rows, T new tokens, row after row."""

    tokens: Ints  # [T]
    starts: Ints  # [R + 1]; row r owns tokens[starts[r]:starts[r + 1]]
    past: Ints  # [R]; tokens already cached for each row
    slots: Ints  # [R]; where each row's past lives
    wanted: Ints  # [W]; indices into tokens whose logits are needed

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        past: Sequence[int],
        slots: Sequence[int],
        wanted: Sequence[int] | None = None,
    ) -> "Batch":
        """Lay rows of new tokens out one after another; by default each row's last is wanted."""
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        return cls(
            tokens=np.concatenate([np.asarray(row, np.int32) for row in rows]),
            starts=starts,
            past=np.asarray(past, np.int32),
            slots=np.asarray(slots, np.int32),
            wanted=starts[1:] - 1 if wanted is None else np.asarray(wanted, np.int32),
        )

    @property
    def positions(self) -> Ints:
        """[T]: each token's place in its own row."""
        counts = np.diff(self.starts)
        return np.arange(len(self.tokens), dtype=np.int32) + np.repeat(
            self.past - self.starts[:-1], counts
        )

    def check(self, config: ModelConfig) -> None:
        """Refuse what the model has no row for: every room asks before it computes.

        Raises:
            ValueError: a token that is not in the vocabulary.
            ContextExceeded: a position past the model's context.
        """
        unknown = self.tokens[(self.tokens < 0) | (self.tokens >= config.vocab_size)]
        if len(unknown):
            raise ValueError(f"token {unknown[0]} is not in 0..{config.vocab_size - 1}")
        last = int(self.positions.max(initial=-1))
        if last >= config.context_length:
            raise ContextExceeded(
                f"position {last} is past the model's context of {config.context_length}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to turn one row of logits into a token. Temperature 0 means argmax."""

    temperature: float = 1.0
    top_k: int = 0  # most likely tokens kept; 0: no limit
    top_p: float = 1.0  # smallest set whose probability reaches this
    min_p: float = 0.0  # tokens at least this fraction as likely as the likeliest

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no limit) or more, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}")


class Cache(Protocol):
    """Key/value memory. The backend owns the bytes, the engine owns the policy."""

    def open(self) -> int:
        """Hand out an empty slot. Raises CacheFull."""

    def reserve(self, slot: int, length: int) -> None:
        """Make room for ``length`` tokens in all. Raises CacheFull and changes nothing."""

    def truncate(self, slot: int, length: int) -> None:
        """Rewind to the first ``length`` tokens.

        Raises CacheMiss, and changes nothing, when a sliding layer no longer holds the window that
        ends there; 0 always works.
        """

    def fork(self, slot: int, length: int) -> int:
        """A new slot that starts with the first ``length`` tokens of ``slot``.

        Raises CacheFull or CacheMiss and changes nothing.
        """

    def close(self, slot: int) -> None:
        """Give the slot back."""


class Backend(Protocol):
    """One way to run the model."""

    config: ModelConfig

    def new_cache(self, *, max_tokens: int) -> Cache:
        """Memory for ``max_tokens`` tokens over all slots together."""

    def forward(self, batch: Batch, cache: Cache, trace: Trace | None = None) -> Logits:
        """Run the batch, append to the cache, return logits [W, V] of the wanted tokens.

        Raises what ``Batch.check`` does, and then changes nothing.
        """

    def sample(
        self, logits: Logits, rules: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int]:
        """One token per row, by inverse CDF at ``uniforms[r]`` in [0, 1).

        The randomness comes from the engine, so a seed means the same on every backend.
        """

    def to_numpy(self, logits: Logits) -> npt.NDArray[np.float32]:
        """[W, V] on the host, for logprobs and verification."""
