"""A turn in which the server runs tools: the model calls, is answered, and goes on, until it ends.

    turn = await answer(served, ask)  # as ``turn.begin``, and then used as a Turn is
    async for event in turn: ...  # also Calling, Called, Ran, for the calls that are run here

Messages are counted through all rounds. What it cost is the sum of the rounds: what the model reads
again in each is mostly ``cached``.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Self

from gptoss.server.errors import ApiError, unavailable
from gptoss.server.served import Served
from gptoss.server.turn import Ask, Closed, Ended, Event, Piece, Turn, Usage, begin
from gptoss.text.messages import Message
from gptoss.tools import Result

PAUSE = 0.1  # seconds until a full queue is tried again: the first round was admitted


@dataclass(frozen=True, slots=True)
class Calling:
    """More text of a call that is run here."""

    row: int
    index: int  # which message it is
    owner: str  # which tool
    recipient: str
    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """Such a call is complete, or was cut."""

    row: int
    index: int
    owner: str
    message: Message


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of it."""

    row: int
    index: int  # of the call
    owner: str
    call: Message
    result: Result


Said = Event | Calling | Called | Ran


async def answer(served: Served, ask: Ask) -> "Turn | Loop":
    """Queue the turn, or its first round. Raises ApiError."""
    turn = await begin(served, ask)
    return Loop(served, ask, turn) if ask.tools else turn


class Loop:
    """The rounds of one answer."""

    def __init__(self, served: Served, ask: Ask, turn: Turn) -> None:
        assert served.tools is not None and ask.settings.n == 1
        self._served, self._ask, self._turn = served, ask, turn
        self._session = served.tools.open(ask.tools)
        self._rounds = self._session.rounds(ask.calls)
        self._said: list[Message] = []  # in the rounds before, results included
        self._spent = Usage(prompt=0, cached=0, completion=0, reasoning=0)  # in those
        self._count = 0  # messages that the model said in those
        self._running: Future[Result] | None = None
        self._cancelled = False
        self._end = None if served.timeout is None else time.monotonic() + served.timeout

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncGenerator[Said, None]:
        """Raises ApiError, or what the engine raised."""
        try:
            while True:
                async for event in self._turn:
                    if isinstance(event, Ended):
                        ended = event
                    else:
                        yield self._told(event)
                said = self._turn.messages()
                call = self._rounds.next(said) if ended.reason == "tool_calls" else None
                if call is None:
                    yield self._ending(ended, said)
                    return
                yield await self._run(call, self._count + len(said) - 1)
                if (early := await self._again(said)) is not None:
                    yield early
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Free the slot, stop the tool, forget the session; later ones change nothing."""
        self._cancelled = True
        self._turn.cancel()
        if self._running is not None:
            self._running.cancel()
        self._session.close()

    @property
    def usage(self) -> Usage:
        """Up to now, of all rounds."""
        return _sum(self._spent, self._turn.usage)

    def _ending(self, ended: Ended, said: Sequence[Message]) -> Ended:
        """As the client is told: "tool_calls" only if there are some for the client."""
        owners = [self._session.owner(m.recipient) for m in said if m.recipient]
        if ended.reason != "tool_calls" or None in owners:
            return ended
        return Ended(ended.row, "length" if said[-1].recipient else "stop")

    def _told(self, event: Piece | Closed) -> Said:
        """The event with the count of all rounds; calls that are run here are told apart."""
        event = replace(event, index=event.index + self._count)
        match event:
            case Piece(recipient=str(recipient)) if owner := self._session.owner(recipient):
                return Calling(event.row, event.index, owner, recipient, event.text)
            case Closed(message=m) if owner := self._session.owner(m.recipient):
                return Called(event.row, event.index, owner, m)
            case Closed(call=str(call)) if self._said:  # the client's: keep what led to it
                thoughts = [m for m in self._turn.messages() if m.channel == "analysis"]
                self._served.thoughts.keep(call, [*self._said, *thoughts])
        return event

    async def _run(self, call: Message, index: int) -> Ran:
        self._running = self._rounds.run(call, self._time_left())
        try:
            result = await asyncio.wrap_future(self._running)
        except asyncio.CancelledError:
            if self._cancelled and not _being_cancelled():
                raise unavailable() from None
            raise
        owner = self._session.owner(call.recipient)
        assert owner is not None
        self._said += [*self._turn.messages(), result.message]
        return Ran(0, index, owner, call, result)

    async def _again(self, said: Sequence[Message]) -> Ended | None:
        """Begin the next round; or how the answer ends, if there can be none."""
        spent, settings = self.usage, self._ask.settings
        left = None if settings.max_tokens is None else settings.max_tokens - spent.completion
        if left is not None and left <= 0:
            return Ended(0, "length")
        ask = replace(
            self._ask,
            messages=[*self._ask.messages, *self._said],
            settings=replace(settings, max_tokens=left),
            choice="none" if self._rounds.over or self._ask.choice == "none" else "auto",
        )
        while not self._cancelled:
            if self._time_left() <= 0:
                return Ended(0, "deadline")
            timeout = None if self._end is None else self._time_left()
            try:
                turn = await begin(replace(self._served, timeout=timeout), ask)
            except ApiError as error:
                if error.code == "context_length_exceeded":
                    return Ended(0, "length")
                if error.status != 429:
                    raise
                await asyncio.sleep(PAUSE)
                continue
            self._turn, self._spent, self._count = turn, spent, self._count + len(said)
            if self._cancelled:
                turn.cancel()
            return None
        raise unavailable()

    def _time_left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()


def _sum(a: Usage, b: Usage) -> Usage:
    return Usage(
        prompt=a.prompt + b.prompt,
        cached=a.cached + b.cached,
        completion=a.completion + b.completion,
        reasoning=a.reasoning + b.reasoning,
    )


def _being_cancelled() -> bool:
    """Whether it is this very task that is to end, and not only what it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
