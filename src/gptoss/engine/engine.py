"""Many requests, one backend: each step runs one batch and hands out what it drew."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Backend
from gptoss.engine.request import Request
from gptoss.engine.stream import Listener, Stream

STEP_TOKENS = 256  # most new tokens in one forward pass: bounds the memory of a long prompt
ROWS = 32  # most sequences that run together


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts since the engine began, except where it says now."""

    steps: int
    running: int  # sequences, now
    waiting: int  # sequences, now
    prompt: int  # tokens of prompts
    reused: int  # of those, not computed because an earlier request had
    recomputed: int  # tokens computed again after a preemption
    preempted: int  # sequences that lost their room
    completion: int  # tokens drawn
    drafted: int  # tokens guessed
    accepted: int  # of those, right
    remembered: int  # prefixes held, now
    remembered_tokens: int  # tokens they reserve, now


class Engine:
    """Continuous batching over one cache. Not for several threads: see ``Worker``."""

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int | None = None,
        max_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS,
        rows: int = ROWS,
    ) -> None:
        """Reserve nothing yet.

        Args:
            vocab_size: ids from here on are padding and never drawn (None: there is none).
            max_tokens: room for all sequences and remembered prefixes together, and the most that
                one may have (None: the model's context).
            step_tokens: most new tokens in one forward pass.
            rows: most sequences that run together.

        Raises:
            ValueError: a number out of range.
        """
        raise NotImplementedError

    def submit(self, request: Request, listener: Listener | None = None) -> Stream:
        """Queue a request; ``step`` or iterating the stream runs it.

        Args:
            listener: is called with each ``Drawn`` as it is drawn, and with None at the end.

        Raises:
            ValueError: a token outside the vocabulary.
            ContextExceeded: the prompt does not fit.
        """
        raise NotImplementedError

    def step(self) -> bool:
        """Run one batch. False: there is nothing to do.

        An error of the backend ends the requests that were in the batch; it is not raised here.
        """
        raise NotImplementedError

    def cancel(self, stream: Stream) -> None:
        """End a request now; its room is free at once."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget all remembered prefixes."""
        raise NotImplementedError

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the model expects after each token: [T] -> [T, V], padding included."""
        raise NotImplementedError

    @property
    def stats(self) -> Stats:
        """What was done so far."""
        raise NotImplementedError
