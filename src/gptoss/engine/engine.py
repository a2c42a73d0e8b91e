"""Many requests, one backend: each step runs one batch and hands out what it drew."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Backend, Batch, Cache, Logits
from gptoss.engine.answers import Answers
from gptoss.engine.draw import check_finite
from gptoss.engine.request import Request
from gptoss.engine.row import Row
from gptoss.engine.scheduler import Scheduler, Turn
from gptoss.engine.search import Beams, Best
from gptoss.engine.stream import Listener, Stream
from gptoss.errors import CacheFull, ContextExceeded, GptOssError

STEP_TOKENS = 256  # most new tokens in one forward pass: bounds the memory of a long prompt
ROWS = 32  # most sequences that run together


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts since the engine began, except where it says now."""

    steps: int
    running: int  # sequences, now
    waiting: int  # sequences, now
    held: int  # tokens that running sequences reserve, now
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
        longest: int | None = None,
        step_tokens: int = STEP_TOKENS,
        rows: int = ROWS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is computed yet.

        Args:
            vocab_size: ids from here on are padding and never drawn (None: there is none).
            max_tokens: room for all sequences and remembered prefixes together (None: the model's
                context).
            longest: most tokens of one sequence (None: as many as there is room for).
            step_tokens: most new tokens in one forward pass.
            rows: most sequences that run together.
            clock: seconds, for timeouts.

        Raises:
            ValueError: a number out of range.
        """
        config = backend.config
        self.backend, self.clock = backend, clock
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self.max_tokens = config.context_length if max_tokens is None else max_tokens
        self.step_tokens = step_tokens
        if not 1 <= self.vocab_size <= config.vocab_size:
            raise ValueError(f"vocab_size must be in 1..{config.vocab_size}, not {vocab_size}")
        most = min(self.max_tokens, config.context_length)
        self.longest = most if longest is None else min(longest, most)
        for name, given in (
            ("max_tokens", self.max_tokens),
            ("longest", self.longest),
            ("step_tokens", step_tokens),
            ("rows", rows),
        ):
            if given < 1:
                raise ValueError(f"{name} must be at least 1, not {given}")
        self.scheduler = Scheduler(self._new_cache(), step_tokens=step_tokens, rows=rows)
        self.arrivals = count()
        self.deadlines: dict[Stream, float] = {}
        self.answers = Answers(backend, self.scheduler)
        self.prompt_tokens = self.steps = 0

    def submit(self, request: Request, listener: Listener | None = None) -> Stream:
        """Queue a request; ``step`` or iterating the stream runs it.

        Args:
            listener: is called with each ``Drawn`` as it is drawn, and with None at the end. If it
                raises, the request ends with that error.

        Raises:
            ValueError: a token outside the vocabulary.
            ContextExceeded: the prompt does not fit.
        """
        self.check(request)
        stream = Stream(request, self.step, self.cancel, listener)
        self.add(stream)
        return stream

    def check(self, request: Request) -> None:
        """Raise what ``submit`` would. Safe in any thread."""
        self._check_prompt(request.prompt)
        if bad := [t for t in request.logit_bias if not 0 <= t < self.vocab_size]:
            raise ValueError(f"logit_bias: token {bad[0]} is outside 0..{self.vocab_size - 1}")

    def add(self, stream: Stream) -> None:
        """Queue what ``check`` has found in order."""
        request = stream.request
        most = self.longest - stream.prompt + 1  # the last token drawn is never fed
        most = min(most, request.max_tokens or most)
        search: Best | Beams | None = None
        if request.beams:
            search = Beams(request, most)
        elif request.best_of is not None:
            search = Best(request)
        row = Row(stream, next(self.arrivals), stream.prompt + most, search=search)
        if isinstance(search, Beams):
            search.live = [row]
        if request.timeout is not None:
            self.deadlines[stream] = self.clock() + request.timeout
        self.prompt_tokens += stream.prompt
        self.scheduler.add(row)

    def step(self) -> bool:
        """Run one batch. False: there is nothing to do.

        An error of the backend ends the requests that were in the batch; it is not raised here.
        After an interrupt all sequences, and they alone, are computed anew.
        """
        try:
            self._expire()
            turns = self.scheduler.plan()
            if not turns:
                return self._stuck()
            self.steps += 1
            starts, logits = self._forward(turns)
            if logits is not None:
                self.answers.take(turns, starts, logits[:, : self.vocab_size])
            return True
        except BaseException:
            self.scheduler.restart(self._new_cache())
            raise

    def cancel(self, stream: Stream, answer: int | None = None) -> None:
        """End a request, or one of its answers (see ``Stream.stop``); the room is free at once."""
        if answer is None:
            self.answers.end(stream, "cancelled")
        else:
            self.answers.stop(stream, answer)

    def abandon(self, error: Exception) -> None:
        """End everything with an error that no request can be blamed for."""
        for row in [*self.scheduler.running, *self.scheduler.waiting]:
            self.answers.end(row.stream, "error", error)

    def clear(self) -> None:
        """Forget all remembered prefixes."""
        self.scheduler.prefixes.clear()

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the model expects after each token: [T] -> [T, V], padding included.

        Raises as ``submit``, and GptOssError for NaN. Sequences that run may lose their room.
        """
        tokens = list(map(int, tokens))
        self._check_prompt(tokens)
        slot, steps = self.scheduler.space(len(tokens)), []
        try:
            for past in range(0, len(tokens), self.step_tokens):
                chunk = tokens[past : past + self.step_tokens]
                batch = Batch.of([chunk], [past], [slot], range(len(chunk)))
                logits = self.backend.forward(batch, self.scheduler.cache)
                check_finite(logits[:, : self.vocab_size])
                steps.append(self.backend.to_numpy(logits))
        except GptOssError:
            self.scheduler.cache.close(slot)
            raise
        except BaseException:
            self.scheduler.restart(self._new_cache())
            raise
        self.scheduler.prefixes.add(tokens, slot)
        return np.concatenate(steps)

    @property
    def stats(self) -> Stats:
        """What was done so far; from any thread."""
        scheduler = self.scheduler
        return Stats(
            steps=self.steps,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            held=sum(row.room for row in [*scheduler.running]),
            prompt=self.prompt_tokens,
            reused=scheduler.reused,
            recomputed=scheduler.recomputed,
            preempted=scheduler.preempted,
            completion=self.answers.completion,
            drafted=self.answers.drafted,
            accepted=self.answers.accepted,
            remembered=len(scheduler.prefixes),
            remembered_tokens=scheduler.prefixes.tokens,
        )

    def _forward(self, turns: list[Turn]) -> tuple[list[int], Logits]:
        """Where each turn's logits begin, and all that are wanted; None if the backend failed."""
        rows: list[list[int]] = []
        starts: list[int] = []
        wanted: list[int] = []
        at = 0
        for turn in turns:
            row = turn.row
            rows.append(row.tokens[row.held : row.held + turn.count] + turn.draft)
            starts.append(len(wanted))
            wanted += range(at + turn.wanted, at + len(rows[-1]))
            at += len(rows[-1])
        held = [turn.row.held for turn in turns]
        slots = [turn.row.slot for turn in turns if turn.row.slot is not None]
        try:
            batch = Batch.of(rows, held, slots, wanted)
            return starts, self.backend.forward(batch, self.scheduler.cache)
        except Exception as error:
            for turn in turns:
                self.answers.end(turn.row.stream, "error", error)
            return starts, None

    def _expire(self) -> None:
        """End what has run out of time; forget about the deadlines of what has ended."""
        if not self.deadlines:
            return
        now = self.clock()
        for stream, deadline in list(self.deadlines.items()):
            if now >= deadline:
                self.answers.end(stream, "deadline")
            if stream.finish is not None:
                del self.deadlines[stream]

    def _stuck(self) -> bool:
        """No turn for anybody: is it that nobody wants one?"""
        if not self.scheduler.waiting:
            return False
        [row, *_] = self.scheduler.waiting
        full = CacheFull(f"the cache has no room for {len(row.tokens)} tokens, though it is empty")
        self.answers.end(row.stream, "error", full)
        return True

    def _new_cache(self) -> Cache:
        return self.backend.new_cache(max_tokens=self.max_tokens)

    def _check_prompt(self, tokens: Sequence[int]) -> None:
        config = self.backend.config
        if not tokens:
            raise ValueError("the prompt is empty; the model needs at least one token to continue")
        if min(tokens) < 0 or max(tokens) >= config.vocab_size:
            bad = next(t for t in tokens if not 0 <= t < config.vocab_size)
            raise ValueError(f"token {bad} is outside the vocabulary of {config.vocab_size}")
        length, context = len(tokens), config.context_length
        if length > context:
            raise ContextExceeded(
                f"the prompt has {length} tokens, more than the model's context of {context}"
            )
        if length > self.longest:
            raise ContextExceeded(
                f"the prompt has {length} tokens, more than the {self.longest} there is room for; "
                f"raise max_tokens (--context); the model's context is {context}"
            )
