"""Tokens from the worker's thread into the event loop, and back the wish to have no more."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gptoss.backends.protocol import Sampling
from gptoss.engine import Constraint, Drawn, Request
from gptoss.server.errors import refusing, unavailable
from gptoss.server.gate import CURRENT
from gptoss.server.served import Served


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to draw and when to stop: what all APIs share. Numbers are checked by ``request``."""

    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None  # None: another one each time
    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None  # of each answer; None: until the room is full
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()  # an answer ends before the first of these
    logprobs: int | None = None  # None: none; k: of each token, and of the k likeliest
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def request(
        self,
        served: Served,
        prompt: Sequence[int],
        *,
        constraint: Constraint | None = None,
        boundaries: Sequence[int] = (),
        prompt_logprobs: int | None = None,
    ) -> Request:
        """For the engine. Raises ValueError."""
        if not all(self.stop):
            raise ValueError("stop: a stop string must not be empty")
        seed = secrets.randbits(63) if self.seed is None else self.seed % (1 << 64)
        return Request(
            prompt=prompt,
            sampling=self.sampling,
            seed=seed,
            stop_tokens=frozenset() if self.ignore_eos else served.tokenizer.stop_tokens,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            n=self.n,
            best_of=self.best_of,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            constraint=constraint,
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
            boundaries=boundaries,
            timeout=served.timeout,
        )


class Feed:
    """The tokens of one request, of all its answers, in the order in which they are drawn."""

    def __init__(self, served: Served, request: Request) -> None:
        """Submit it. Raises ApiError: the prompt is too long, or too many wait."""
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Drawn | None] = asyncio.Queue()
        self.meter = served.metrics.meter()
        with refusing():
            self.stream = served.worker.submit(replace(request, id=CURRENT.get()), self._listen)

    async def __aiter__(self) -> AsyncGenerator[Drawn, None]:
        """Raises the request's error, and ApiError if somebody else cancelled it."""
        while (drawn := await self._arrived.get()) is not None:
            self.meter.token()
            yield drawn
        self.meter.end(self.stream.finish or "cancelled")
        if self.stream.error is not None:
            raise self.stream.error
        if self.stream.finish == "cancelled":
            raise unavailable()

    def cancel(self, finish: str = "cancelled") -> None:
        """No more, please: the slot is free within a step. ``finish`` is for the statistics."""
        self.meter.end(finish)
        self.stream.cancel()

    def _listen(self, drawn: Drawn | None) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, drawn)
