"""What every request passes before it is looked at: its host, its key, its size; and its line in
the log.

A page in a browser can give its own name the address 127.0.0.1 and then ask as if it came from
there. So who listens on such an address, and asks for no key, is called by an address or localhost.
"""

import asyncio
import re
import secrets
import time
from contextvars import ContextVar
from ipaddress import ip_address
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss.server.errors import ApiError, failed, overloaded, unavailable
from gptoss.server.keys import Keys
from gptoss.server.logs import failure, note
from gptoss.server.metrics import Metrics
from gptoss.server.sse import error_response

OPEN = ("/health", "/ready")  # need no key, and are answered whatever is going on
LARGEST = 8 << 20  # bytes of a body; 131,072 tokens take about 1 MiB
SLOWEST = 30.0  # seconds for a body to arrive
TOGETHER = 256 << 20  # bytes of all bodies that are here
MOST = 512  # requests at once whose body has arrived
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
FIELD = re.compile(r"\w{1,40}", re.ASCII)
CURRENT: ContextVar[str] = ContextVar("CURRENT", default="")  # the id of the request at hand


def tell(request: Request, **fields: Any) -> None:
    """Add to the request's line in the log: counts and reasons, never what was said."""
    request.state.told.update(fields)


class Gate:
    """Around the application. Answers in its place where a request may not pass."""

    def __init__(self, app: ASGIApp, *, keys: Keys, metrics: Metrics) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics
        self.draining = False  # set when the server is to stop
        self.local = False  # set when only this machine can reach the server
        self.inside = self.working = 0  # requests; those whose body has arrived
        self.bytes = 0  # of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        passage, body = Passage(scope, send), bytearray()
        self.inside += 1
        try:
            self._admit(scope)
            await self._take(scope, receive, body)
            await self._pass(scope, receive, bytes(body), passage)
        except ApiError as error:
            await passage.refuse(error, receive)
        except Exception as error:
            failure(error, passage.id)
            await passage.refuse(failed(), receive)
        finally:
            self.inside -= 1
            self.bytes -= len(body)
            self.metrics.answered.labels(str(passage.status or "none")).inc()
            passage.log()

    def _admit(self, scope: Scope) -> None:
        if self.local and not self.keys and not _is_here(_header(scope, b"host")):
            message = (
                "this server is called localhost, or by its address, where it has no --api-key"
            )
            raise ApiError(403, message, type="permission_error", code="host_not_allowed")
        if scope["path"] in OPEN:
            return
        if not self.keys.fit(_header(scope, b"authorization")):
            raise ApiError(
                401,
                "this server asks for its key: Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if self.draining:
            raise unavailable()

    async def _take(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        """All of the body. Raises ApiError: too large, too slow, or too many are here."""
        said = _header(scope, b"content-length") or b""
        if said.isdigit() and int(said[:20]) > LARGEST:
            raise _too_large()
        try:
            async with asyncio.timeout(SLOWEST):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client hung up")
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    body += piece
                    self.bytes += len(piece)
                    if len(body) > LARGEST:
                        raise _too_large()
                    if self.bytes > TOGETHER:
                        raise overloaded("too many large requests are here; try again later")
        except TimeoutError:
            late = f"the body did not arrive within {SLOWEST:.0f} seconds"
            raise ApiError(408, late) from None

    async def _pass(self, scope: Scope, receive: Receive, body: bytes, passage: "Passage") -> None:
        if self.working >= MOST and scope["path"] not in OPEN:
            raise overloaded(f"{MOST} requests are here already; try again later")
        self.working += 1
        try:
            await self.app(scope, _replay(body, receive), passage.send)
        finally:
            self.working -= 1


class Passage:
    """One request on its way through."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = (_header(scope, b"x-request-id") or b"").decode("latin-1")
        self.id = given if ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        self.status = 0  # of the response; 0: none yet
        self._scope, self._send, self._begun = scope, send, time.monotonic()
        self.told: dict[str, Any] = {}
        scope.setdefault("state", {}).update(id=self.id, told=self.told)
        CURRENT.set(self.id)

    async def send(self, message: Message) -> None:
        """To the client, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], (b"x-request-id", self.id.encode())]
            if ignored := self._ignored():
                headers.append((b"x-gptoss-ignored", ignored.encode()))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, error: ApiError, receive: Receive) -> None:
        """Answer with an error, if no answer has begun."""
        if not self.status:
            await error_response(error)(self._scope, receive, self.send)

    def log(self) -> None:
        """Its line."""
        told = self.told | {"ignored": self._ignored()}
        line = {
            "id": self.id,
            "method": self._scope["method"],
            "path": self._scope["path"][:200],
            "status": self.status,
            "seconds": round(time.monotonic() - self._begun, 4),
        }
        note("request", line | {k: v for k, v in told.items() if v})

    def _ignored(self) -> str:
        names = [n for n in self.told.get("ignored", ()) if FIELD.fullmatch(n)]
        return ",".join(names[:16])


def _is_here(host: bytes | None) -> bool:
    """Whether a Host header is an address or localhost; without one it is no browser that asks."""
    if host is None:
        return True
    name = re.sub(rb":\d*$", b"", host.strip()).strip(b"[]").decode("latin-1").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {LARGEST >> 20} MiB", code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then what else the client does."""
    unread = [body]

    async def inner() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return inner


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)
