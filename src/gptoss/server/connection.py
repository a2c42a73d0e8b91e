"""One client's connection: who does not come to the point is hung up on.

What is no HTTP gets its 400 in the form of all errors. Where there are too many connections, the
one goes that has asked for nothing yet, or has not finished asking, for the longest time.
"""

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from gptoss.server.errors import refused

HEADERS_WITHIN = 20.0  # seconds that a client may take to say what it wants
MOST_CONNECTIONS = 2048
LARGEST_HEADER = 32 << 10  # bytes


class Connection(H11Protocol):
    """See uvicorn."""

    _patience: asyncio.TimerHandle | None = None
    _since = 0.0  # when it was last told everything, or was made

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > MOST_CONNECTIONS:
            self._oldest_idle().transport.close()
        self._wait()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._relax()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """See uvicorn."""
        self._since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or its header has no end."""
        if not (self._asked_nothing or self.cycle.more_body):
            return self.transport.close()  # an answer may be on its way
        said = refused(f"this is no HTTP request, or its header is above {LARGEST_HEADER} bytes")
        body = json.dumps(said.body).encode()
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _oldest_idle(self) -> "Connection":
        """Of those that nobody works for; itself, if there is none."""
        others = (c for c in self.connections if isinstance(c, Connection) and c._idle)
        return min(others, key=lambda c: c._since, default=self)

    @property
    def _idle(self) -> bool:
        closing = self.transport.is_closing()
        return not closing and (self._asked_nothing or self.cycle.more_body)

    @property
    def _asked_nothing(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        """The clock runs while part of a header is here and the rest is not."""
        if not self._asked_nothing:
            self._relax()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEADERS_WITHIN, self.transport.close)

    def _relax(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def make_room() -> None:
    """Let this process have files for all connections, as far as the system allows it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = MOST_CONNECTIONS + 256
    if hard != resource.RLIM_INFINITY:
        want = min(want, hard)
    if soft != resource.RLIM_INFINITY and soft < want:
        resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))
