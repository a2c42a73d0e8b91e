"""Answers on their way: a stream of events or one document; both end when nobody listens."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from gptoss.server.errors import ApiError, as_api_error
from gptoss.server.logs import failure

PATIENCE = 60.0  # seconds that a client may take to read one event
SILENCE = 15.0  # seconds after which a comment keeps proxies from giving up
DONE = b"data: [DONE]\n\n"


class Unread(Exception):
    """The client has not read for too long."""


def event(data: Any, name: str | None = None) -> bytes:
    """One event. All characters beyond ASCII are escaped: some clients take others for newlines."""
    line = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {line}\n\n".encode()


class Json(JSONResponse):
    """A document; escapes like ``event``, so that no text can fail to be encoded."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """To bytes."""
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def error_response(error: ApiError) -> Json:
    """In OpenAI's form."""
    return Json(error.body, error.status, error.headers)


class Whole(Response):
    """A document that takes a while. Who hangs up ends the work on it.

    ``close`` frees what was taken for it; it is called at the end, whatever that is.
    """

    media_type = "application/json"

    def __init__(
        self,
        work: Callable[[], Awaitable[Any]],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._work, self._close = work, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        work = asyncio.ensure_future(self._answer(scope))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work.result()(scope, receive, send)
        finally:
            self._close()
            await _end(work, gone)

    async def _answer(self, scope: Scope) -> Response:
        try:
            return Json(await self._work())
        except Exception as error:
            return error_response(_told(error, scope))


class EventStream(Response):
    """Events as they come. An error becomes the last event; who hangs up ends the work.

    ``close`` as in ``Whole``: events that nobody began to read cannot free anything themselves.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        work = asyncio.ensure_future(self._pour(scope, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._close()
            await _end(work, gone)

    async def _pour(self, scope: Scope, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._beating()) as events:
            try:
                async for data in events:
                    await _send(send, data)
            except Unread:
                return  # uvicorn hangs up where a response was not completed
            except Exception as error:
                await _send(send, event(_told(error, scope).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beating(self) -> AsyncGenerator[bytes, None]:
        """The events, and comments where there is none for long."""
        following = asyncio.ensure_future(anext(self._events, None))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=SILENCE)
                if not done:
                    yield b": still here\n\n"
                    continue
                data = following.result()
                if data is None:
                    return
                yield data
                following = asyncio.ensure_future(anext(self._events, None))
        finally:
            await _end(following)
            await self._events.aclose()


async def _send(send: Send, data: bytes) -> None:
    message: Message = {"type": "http.response.body", "body": data, "more_body": True}
    try:
        async with asyncio.timeout(PATIENCE):
            await send(message)
    except TimeoutError:
        raise Unread from None


async def _gone(receive: Receive) -> None:
    """Until the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task


def _told(error: Exception, scope: Scope) -> ApiError:
    said = as_api_error(error)
    if said.status >= 500 and not isinstance(error, ApiError):
        failure(error, scope.get("state", {}).get("id"))
    return said
