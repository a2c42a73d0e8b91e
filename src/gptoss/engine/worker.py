"""A thread that steps an engine, so that any number of others can wait for tokens."""

from types import TracebackType
from typing import Self

from gptoss.engine.engine import Engine, Stats
from gptoss.engine.request import Request
from gptoss.engine.stream import Listener, Stream

WAITING = 256  # requests accepted and not yet running


class Worker:
    """Owns the engine: from ``start`` to ``stop`` nobody else may call it.

    >>> with Worker(engine) as worker:
    ...     for drawn in worker.submit(Request(prompt=[1, 2, 3])): ...

    A step that fails ends the requests that were in it, and the thread goes on.
    """

    def __init__(self, engine: Engine, *, waiting: int = WAITING) -> None:
        """``waiting``: most requests that are accepted and not yet running."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if it was started before."""
        raise NotImplementedError

    def submit(self, request: Request, listener: Listener | None = None) -> Stream:
        """Queue a request; from any thread, and without waiting.

        Args:
            listener: is called in the worker's thread with each ``Drawn`` and at the end, once,
                with None (then ``stream.finish`` is set); it must not block. An asyncio server
                passes ``lambda drawn: loop.call_soon_threadsafe(queue.put_nowait, drawn)``. If it
                raises, the request is cancelled.

        Returns:
            A stream whose iteration waits for the thread; or ignore that and listen.

        Raises:
            ValueError: a token outside the vocabulary.
            ContextExceeded: the prompt does not fit.
            Overloaded: too many are waiting, or the worker is stopping; try later.
        """
        raise NotImplementedError

    def cancel(self, stream: Stream) -> None:
        """End a request soon, with finish "cancelled"; from any thread. As ``stream.cancel()``."""
        raise NotImplementedError

    def stop(self, timeout: float = 0.0) -> None:
        """Take no more requests, let those there are finish for ``timeout`` seconds, cancel the
        rest and end the thread. From any thread; a second call only waits."""
        raise NotImplementedError

    @property
    def stats(self) -> Stats:
        """See ``Engine.stats``; as of the end of the last step."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
