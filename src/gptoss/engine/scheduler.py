"""Who runs next, and whose room is taken away when there is too little.

First come, first served: earlier requests are admitted first and preempted last, and every sequence
that runs is served in every step, so nobody starves. A preempted sequence is computed again, later.
"""

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

from gptoss.backends.protocol import Cache
from gptoss.engine.prefix import Prefixes
from gptoss.engine.row import Row
from gptoss.engine.speculate import CROWD
from gptoss.errors import CacheFull, CacheMiss

AHEAD = 64  # tokens reserved at a time: who gets room again keeps it for so many at least
WORTH = 32  # tokens that two have in common and one waits for
REWIND = 128  # tokens that a cache can be rewound by, whatever its windows
ORDER = attrgetter("order")
FIRST = (-1, -1)  # before all rows


@dataclass(frozen=True, slots=True)
class Turn:
    """One row's part of a step."""

    row: Row
    count: int  # of its pending tokens
    draft: list[int]  # guesses behind them; only where nothing stays pending

    @property
    def draws(self) -> bool:
        """Whether the next token can be drawn after it."""
        return self.count == self.row.pending

    @property
    def wanted(self) -> int:
        """Logits are wanted of its tokens from here on."""
        row, last = self.row, self.count - self.draws
        if row.request.prompt_logprobs is None:
            return last
        return min(max(0, len(row.stream.prompt_logprobs) - row.held), last)


class Scheduler:
    """Rows that wait, rows that run, and the room they have."""

    def __init__(self, cache: Cache, *, step_tokens: int, rows: int) -> None:
        """Every running row needs a token in each step, so no more than ``step_tokens`` run."""
        self.cache, self.prefixes = cache, Prefixes(cache)
        self.step_tokens, self.rows = step_tokens, min(rows, step_tokens)
        self.waiting: list[Row] = []  # by order
        self.running: list[Row] = []
        self.preempted = 0  # how often
        self.reused = self.recomputed = 0  # tokens: see ``Stats``

    def add(self, row: Row) -> None:
        """A row to be admitted when its turn comes; one that brings its slot runs at once."""
        if row.slot is None:
            insort(self.waiting, row, key=ORDER)
        else:
            self.running.append(row)

    def plan(self) -> list[Turn]:
        """What the next step computes, oldest first; empty: nothing can be done."""
        while True:
            self._admit()
            for row in self._active():
                if row.room < len(row.tokens) and row.slot is not None:  # not preempted meanwhile
                    self._grow(row)
            if turns := self._turns(self._active()):
                return turns
            if not (self.waiting and self.running):
                return []
            self.preempt(max(self.running, key=ORDER))  # beams that wait for one without a slot

    def release(self, row: Row, *, remember: bool = True) -> None:
        """Out of all lists; what its slot holds is remembered, unless it is not to be."""
        for rows in (self.waiting, self.running):
            if row in rows:
                rows.remove(row)
        slot, row.slot = row.slot, None
        if slot is not None and remember and row.request.remember and row.held:
            self.prefixes.add(row.tokens[: row.held], slot)
        elif slot is not None:
            self.cache.close(slot)

    def fork(self, row: Row, child: Row) -> None:
        """Let ``child``, which is as far as ``row``, run in a copy of its slot, or wait."""
        child.lost = max(row.lost, row.held)
        while row.slot is not None and len(self.running) < self.rows:
            try:
                child.slot = self.cache.fork(row.slot, row.held)
                child.held = child.room = row.held
                break
            except CacheMiss:
                break
            except CacheFull:
                if not self.prefixes.evict():
                    break
        self.add(child)

    def replace(self, row: Row, child: Row) -> None:
        """Let ``child``, which is as far as ``row``, run in its place."""
        child.lost, child.held, child.room = max(row.lost, row.held), row.held, row.room
        child.slot, row.slot = row.slot, None
        if row in self.running:
            self.running.remove(row)
        self.add(child)

    def rewind(self, row: Row) -> None:
        """Drop from a row's slot what is behind its ``held``: guesses that were wrong."""
        assert row.slot is not None
        try:
            self.cache.truncate(row.slot, row.held)
            row.room = row.held
        except CacheMiss:
            self.preempt(row)

    def preempt(self, row: Row) -> None:
        """Take a running row's room away; it waits for its turn, unless it needs no step."""
        assert row.slot is not None
        self.running.remove(row)
        self.cache.close(row.slot)
        self.preempted += 1
        self._forget(row)

    def restart(self, cache: Cache) -> None:
        """Nobody knows what the cache holds: all begin again in another one."""
        self.cache, self.prefixes = cache, Prefixes(cache)
        rows, self.running = self.running, []
        for row in rows:
            self._forget(row)

    def space(self, tokens: int) -> int:
        """An empty slot with room for ``tokens``, whatever that takes from others.

        Raises CacheFull if the whole cache is too small.
        """
        slot = self.cache.open()
        while True:
            try:
                self.cache.reserve(slot, tokens)
                return slot
            except CacheFull:
                if not self._make_room(FIRST):
                    self.cache.close(slot)
                    raise

    def _active(self) -> list[Row]:
        return sorted((row for row in self.running if not row.ready), key=ORDER)

    def _admit(self) -> None:
        """Rows in order of arrival, as long as there is room; nobody overtakes."""
        while self.waiting and len(self.running) < self.rows:
            row = self.waiting[0]
            if self._awaits(row) or not self._open(row):
                return
            self.running.append(self.waiting.pop(0))

    def _awaits(self, row: Row) -> bool:
        """Whether a running row is about to compute a beginning that both have, up to a boundary:
        computed once it serves both, and computed twice neither would be sooner."""
        if row.request.prompt_logprobs is not None:
            return False
        for other in self.running:
            if other.held < other.start and other.request.remember:
                coming = (b for b in other.request.boundaries if b > max(other.held, WORTH))
                if any(b < len(row.tokens) and row.tokens[:b] == other.tokens[:b] for b in coming):
                    return True
        return False

    def _open(self, row: Row) -> bool:
        """A slot with room for all tokens of a row, and in it what is remembered of them."""
        found = None
        if row.request.prompt_logprobs is None:  # else every token is to be computed
            found = self.prefixes.take(row.tokens[:-1])
        row.slot, row.held = found or (self.cache.open(), 0)
        row.room = row.held
        while not self._reserve(row, len(row.tokens)):
            if not self._make_room(row.order):
                self._put_back(row)
                return False
        if row.lost:
            row.stream.recomputed += max(0, row.lost - row.held)
            self.recomputed += max(0, row.lost - row.held)
        else:
            row.stream.reused = row.held
            self.reused += row.held
        return True

    def _put_back(self, row: Row) -> None:
        """What was found for a row that must wait."""
        assert row.slot is not None
        if row.held:
            self.prefixes.add(row.tokens[: row.held], row.slot)
        else:
            self.cache.close(row.slot)
        row.slot, row.held, row.room = None, 0, 0

    def _grow(self, row: Row) -> None:
        """Room for its next tokens, or it is preempted."""
        while not self._reserve(row, len(row.tokens)):
            if not self._make_room(row.order):
                return self.preempt(row)

    def _reserve(self, row: Row, length: int) -> bool:
        """Whether a row has room for ``length`` tokens now; no other loses any."""
        assert row.slot is not None
        for want in (max(length, min(length + AHEAD, row.limit - 1)), length):
            if row.room >= length:
                return True
            try:
                self.cache.reserve(row.slot, want)
                row.room = want
            except CacheFull:
                pass
        return row.room >= length

    def _make_room(self, order: tuple[int, int]) -> bool:
        """Forget a prefix, or preempt the youngest row behind ``order``. False: nothing is left."""
        if self.prefixes.evict():
            return True
        youngest = max(self.running, key=ORDER, default=None)
        if youngest is None or youngest.order <= order:
            return False
        self.preempt(youngest)
        return True

    def _forget(self, row: Row) -> None:
        """Its slot is gone."""
        row.slot, row.lost = None, max(row.lost, row.held)
        row.held = row.room = 0
        if not row.ready:
            self.add(row)

    def _turns(self, rows: list[Row]) -> list[Turn]:
        """A token for each, what is left of the step for prompts, and the rest for guesses."""
        left = self.step_tokens - len(rows)
        counts = []
        for row in rows:
            counts.append(chunk(row, 1 + left))
            left -= counts[-1] - 1
        guess = len(rows) <= CROWD
        turns = []
        for row, count in zip(rows, counts, strict=True):
            draft = self._draft(row, left) if guess and count == row.pending else []
            left -= len(draft)
            turns.append(Turn(row, count, draft))
        return turns

    def _draft(self, row: Row, most: int) -> list[int]:
        """Guesses behind a row's last token, as many as there is room for anyway."""
        if row.lookup is None or not row.split:
            return []
        draft = row.lookup.draft(row.tokens, min(most, row.limit - len(row.tokens) - 1))
        return draft if self._reserve(row, len(row.tokens) + len(draft)) else []


def chunk(row: Row, most: int) -> int:
    """How many pending tokens a step takes: up to ``most``, or to a boundary that could not be
    rewound to afterwards."""
    end = min(row.held + most, len(row.tokens))
    cuts = (b for b in row.request.boundaries if row.held < b < end - REWIND)
    return next(cuts, end) - row.held
