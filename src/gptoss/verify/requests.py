"""Every request that an engine serves, recorded into one file while others run beside it.

Bounded: of each row no more than ``PART`` tokens wait to be written; keys, of which sinks are
computed, take ``KEYS`` bytes at most (then the longest row's sinks are not known any more); and the
file does not grow beyond what is asked. What cannot be recorded is served all the same.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from gptoss.backends.protocol import Batch
from gptoss.engine import Engine, Stream
from gptoss.engine.row import Row as EngineRow
from gptoss.model.weights import Read
from gptoss.verify.record import STEP, Recorder, Row
from gptoss.verify.trace import TraceFile, joined
from gptoss.verify.traces import Writer

LOG = logging.getLogger("gptoss.trace")
PART = 256  # tokens
KEYS = 1 << 30  # bytes


@dataclass(slots=True, eq=False)
class Live:
    """A sequence that is not over."""

    key: str
    row: Row
    prompt: int
    id: str
    after: tuple[str, int] | None = None  # the trace that it goes on from


class Requests:
    """Between an engine and its backend, from ``attach`` on."""

    def __init__(
        self,
        engine: Engine,
        read: Read,
        writer: Writer,
        points: Sequence[str] = (),
        **about: object,
    ) -> None:
        """``about`` goes into every header."""
        self.engine, self.writer, self.about = engine, writer, about
        self.recorder = Recorder(engine.backend, read, points, self._whose)
        self.run = secrets.token_hex(4)  # a file may hold those of several processes
        self.live: dict[tuple[int, int], Live] = {}
        self.over = False

    def attach(self) -> None:
        """Record from now on. No prefix is reused and nothing guessed ahead, so that every token of
        a request is computed in it, once."""
        engine, add, release = self.engine, self.engine.add, self.engine.scheduler.release

        def plainly(stream: Stream) -> None:
            if not self.over:
                stream.request = replace(stream.request, speculate=False, remember=False)
            add(stream)

        def released(row: EngineRow, *, remember: bool = True) -> None:
            release(row, remember=remember)
            if (live := self.live.pop(row.order, None)) is not None:
                self._write(live)

        engine.clear()
        engine.backend, engine.add = self.recorder, plainly  # type: ignore[method-assign]
        engine.scheduler.release = released  # type: ignore[method-assign]
        engine.step_tokens = engine.scheduler.step_tokens = min(engine.step_tokens, STEP)

    def _whose(self, batch: Batch) -> Sequence[Row | None]:
        """Before a step: the trace of each row, which may begin here."""
        for live in [*self.live.values()]:
            if live.row.waiting >= PART:
                self._write(live)
        if self.over:
            return [None] * len(batch.slots)
        rows = {row.slot: row for row in self.engine.scheduler.running if row.slot is not None}
        pairs = zip(batch.slots.tolist(), batch.past.tolist(), strict=True)
        found = [self._live(rows[slot], past).row if slot in rows else None for slot, past in pairs]
        self._forget_keys()
        return found

    def _live(self, row: EngineRow, past: int) -> Live:
        live = self.live.get(row.order)
        if live is None:
            arrival, index = row.order
            id = row.request.id or f"request-{arrival}"
            new = Row(self.recorder.config, self.recorder.sinks)
            live = Live(f"{self.run}.{arrival}.{index}", new, row.start, id)
            self.live[row.order] = live
            first = self.live.get((arrival, 0))
            if past and first is not None and first is not live:  # forked behind the prompt
                live.after = first.key, past
                new.expected = first.row.expected
                new.keys = first.row.keys and first.row.keys.copy()
        elif past == 0:  # it lost its room, and begins anew
            live.after = None
        return live

    def _forget_keys(self) -> None:
        held = {live.key: live.row for live in self.live.values() if live.row.keys is not None}
        while sum(row.keys.nbytes for row in held.values() if row.keys) > KEYS:
            longest = max(held, key=lambda key: getattr(held[key].keys, "nbytes", 0))
            held.pop(longest).keys = None

    def _write(self, live: Live) -> None:
        parts = live.row.take()
        if not parts or self.over:
            return
        about = {"config": asdict(self.recorder.config), "points": self.recorder.names}
        trace = TraceFile({**self.about, **about, "prompt": live.prompt}, joined(parts))
        past = min(start for start, _ in parts)
        try:
            self.writer.add(trace, key=live.key, id=live.id, past=past, after=live.after)
        except OSError as error:
            self.over = True
            self.live.clear()
            LOG.warning(
                "%s takes no more (%s); requests are served and no longer recorded",
                self.writer.path,
                error.strerror,
            )
