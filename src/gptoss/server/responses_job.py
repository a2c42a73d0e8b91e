"""One response in the making: the turn that makes it, what it says on the way, and its end.

A job is no client's: it runs until it is over or told to stop, and any number may listen. Its last
event is told only when its record is safe.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from gptoss.errors import GrammarError
from gptoss.server.errors import ApiError, as_api_error
from gptoss.server.logs import failure
from gptoss.server.loop import Loop
from gptoss.server.responses_document import usage
from gptoss.server.responses_output import Output
from gptoss.server.sse import event as framed
from gptoss.server.store import Record, Store
from gptoss.server.turn import Ended, Reason, Turn

LAST = {"completed": "completed", "failed": "failed"}  # all else is incomplete
SLOW = "the response took longer than this server allows"
LOST = "the response is made, but could not be stored; the server's log says why"


class Job:
    """The response as it is now (``document``), and its events (``follow``)."""

    def __init__(
        self,
        document: dict[str, Any],
        given: list[dict[str, Any]],
        turn: Turn | Loop,
        output: Output,
        *,
        store: Store | None,
        streams: bool,
        over: Callable[["Job"], None],
    ) -> None:
        """``store``: None keeps nothing. ``streams``: whether anybody wants the events."""
        self.id: str = document["id"]
        self.background: bool = document["background"]
        self.given, self.store, self.streams = given, store, streams
        self.over = asyncio.Event()
        self.error: ApiError | None = None  # why it failed
        self.lost = False  # could not be stored
        self.size = 0  # bytes of its events
        self._document, self._turn, self._output = document, turn, output
        self._is_over, self._stopped = over, False
        self._events: list[bytes] = []
        self._news = asyncio.Event()

    @property
    def document(self) -> dict[str, Any]:
        """The response object as it is now."""
        if self.over.is_set():
            return self._document
        return self._document | {"output": self._output.items}

    def start(self) -> None:
        """Let it run."""
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Free its slot: it is over within a step. If it is over, nothing happens."""
        self._stopped = True
        self._turn.cancel()

    async def follow(self, after: int = -1) -> AsyncGenerator[bytes, None]:
        """Its events behind the one of that number, as they come. Those of a background response
        stay; of others, each is told once."""
        at = after + 1
        while True:
            while at < len(self._events):
                yield self._events[at]
                if not self.background:
                    self._events[at] = b""
                at += 1
            if self.over.is_set():
                return
            await self._news.wait()

    async def _run(self) -> None:
        self._tell("created")
        self._tell(self._document["status"])
        change: dict[str, Any] = {}
        try:
            async for event in self._turn:
                if self._document["status"] == "queued":
                    self._document["status"] = "in_progress"
                    self._tell("in_progress")
                if isinstance(event, Ended):
                    change = _ending(event.reason)
                for said in self._output.take(event):
                    self._send(said)
        except Exception as error:
            change = {"status": "cancelled"} if self._stopped else self._failed(error)
        finally:
            self._turn.cancel()
        await self._end(change)

    async def _end(self, change: dict[str, Any]) -> None:
        for said in self._output.close("incomplete"):
            self._send(said)
        spent = {"output": self._output.items, "usage": usage(self._turn.usage)}
        document = self._document | spent | change
        if self.store is not None:
            try:
                await self.store.put(Record(document, self.given))
            except Exception as error:
                failure(error, self.id)
                self.lost = True
                document |= _failure(LOST) | {"completed_at": None}
                self.error = ApiError(500, LOST, type="server_error")
        self._document = document
        self.over.set()
        self._is_over(self)
        self._tell(LAST.get(document["status"], "incomplete"))

    def _failed(self, error: Exception) -> dict[str, Any]:
        self.error = as_api_error(error)
        if self.error.status >= 500 and not isinstance(error, ApiError):
            failure(error, self.id)
        code = "invalid_prompt" if isinstance(error, GrammarError) else "server_error"
        return _failure(self.error.message, code)

    def _tell(self, name: str) -> None:
        self._send({"type": f"response.{name}", "response": self.document})

    def _send(self, said: dict[str, Any]) -> None:
        if not self.streams:
            return
        numbered = {"type": said["type"], "sequence_number": len(self._events), **said}
        self._events.append(framed(numbered, said["type"]))
        self.size += len(self._events[-1])
        news, self._news = self._news, asyncio.Event()
        news.set()


def _ending(reason: Reason) -> dict[str, Any]:
    match reason:
        case "length":
            why = {"reason": "max_output_tokens"}
            return {"status": "incomplete", "incomplete_details": why}
        case "deadline":
            return _failure(SLOW)
        case _:
            return {"status": "completed", "completed_at": int(time.time())}


def _failure(message: str, code: str = "server_error") -> dict[str, Any]:
    return {"status": "failed", "error": {"code": code, "message": message}}
