"""A thread that steps an engine, so that any number of others can wait for tokens."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from gptoss.engine.engine import Engine, Stats
from gptoss.engine.request import Request
from gptoss.engine.stream import Drawn, Listener, Stream
from gptoss.errors import GptOssError, Overloaded

WAITING = 256  # sequences accepted and not running
LOG = logging.getLogger(__name__)


class Worker:
    """Owns the engine: from ``start`` to ``stop`` nobody else may call it.

    >>> with Worker(engine) as worker:
    ...     for drawn in worker.submit(Request(prompt=[1, 2, 3])): ...

    A step that fails ends the requests that were in it, and the thread goes on.
    """

    def __init__(self, engine: Engine, *, waiting: int = WAITING) -> None:
        """``waiting``: most sequences that are accepted and not yet running, or not at present."""
        if waiting < 1:
            raise ValueError(f"waiting must be at least 1, not {waiting}")
        self.engine, self.waiting = engine, waiting
        self._thread = threading.Thread(target=self._run, name="gptoss-engine", daemon=True)
        self._change = threading.Condition()  # guards what follows
        self._inbox: deque[Callable[[], None]] = deque()  # for the thread to do between steps
        self._queued = 0  # requests in the inbox
        self._closing = self._hurry = False  # no more requests; no more steps

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if it was started before."""
        self._thread.start()

    def submit(self, request: Request, listener: Listener | None = None) -> Stream:
        """Queue a request; from any thread, and without waiting.

        Args:
            listener: is called in the worker's thread with each ``Drawn`` and at the end, once,
                with None (then ``stream.finish`` is set); it must not block. An asyncio server
                passes ``lambda drawn: loop.call_soon_threadsafe(queue.put_nowait, drawn)``. If it
                raises, the request ends with that error.

        Returns:
            A stream whose iteration waits for the thread; or ignore that and listen.

        Raises:
            ValueError: a token outside the vocabulary.
            ContextExceeded: the prompt does not fit.
            Overloaded: too many are waiting, or the worker is stopping; try later.
        """
        self.engine.check(request)
        news = threading.Event()

        def tell(drawn: Drawn | None) -> None:
            news.set()
            if listener is not None:
                listener(drawn)

        def pull() -> None:
            news.wait()
            news.clear()

        stream = Stream(request, pull, self.cancel, tell)
        with self._change:
            if self._closing:
                raise Overloaded("the worker is stopping and takes no more requests")
            if self._queued + self.stats.waiting >= self.waiting:
                raise Overloaded(f"{self.waiting} requests wait already; try again later")
            self._queued += 1
            self._do(lambda: self._add(stream))
        return stream

    def cancel(self, stream: Stream, answer: int | None = None) -> None:
        """End a request soon, or one of its answers; from any thread. As ``stream.cancel()``."""
        with self._change:
            self._do(lambda: self.engine.cancel(stream, answer))

    def stop(self, timeout: float = 0.0) -> None:
        """Take no more requests, let those there are finish for ``timeout`` seconds, cancel the
        rest and end the thread. From any other thread; a second call only waits."""
        with self._change:
            self._closing = True
            self._change.notify()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout)
        with self._change:
            self._hurry = True
            self._change.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs: started, and neither stopped nor dead."""
        return self._thread.is_alive()

    @property
    def stats(self) -> Stats:
        """See ``Engine.stats``; from any thread."""
        return self.engine.stats

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

    def _do(self, job: Callable[[], None]) -> None:
        """Let the thread do it. The caller holds ``_change``."""
        self._inbox.append(job)
        self._change.notify()

    def _add(self, stream: Stream) -> None:
        self.engine.add(stream)
        with self._change:
            self._queued -= 1

    def _run(self) -> None:
        """The thread: what others asked for, then a step, until it is to end."""
        idle = True
        while True:
            with self._change:
                while idle and not self._inbox and not self._closing:
                    self._change.wait()
                jobs, self._inbox = self._inbox, deque()
                over = self._hurry or (self._closing and idle and not jobs)
            try:
                for job in jobs:
                    job()
                if over:
                    return self._cancel_all()
                idle = not self.engine.step()
            except Exception as error:  # of no row in particular: nobody can go on
                LOG.exception("a step failed")
                self.engine.abandon(GptOssError(f"the engine failed: {error!r}"))
                idle = True

    def _cancel_all(self) -> None:
        scheduler = self.engine.scheduler
        for row in [*scheduler.running, *scheduler.waiting]:
            self.engine.cancel(row.stream)
