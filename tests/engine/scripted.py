"""A backend that computes nothing: its logits are a function of the tokens so far."""

import hashlib
from dataclasses import replace

import numpy as np

from gptoss.backends.sampling import sample_rows
from gptoss.backends.slots import Slots
from gptoss.errors import CacheMiss
from tests.conftest import TINY

CONFIG = replace(TINY, initial_context_length=64, rope_scaling_factor=1.0)


class History(Slots):
    """A cache that holds the tokens themselves; ``window``: how far it can be rewound."""

    def __init__(self, max_tokens, window=None):
        super().__init__(max_tokens)
        self.held, self.window, self.broken = {}, window, False

    def open(self):
        slot = super().open()
        self.held[slot] = []
        return slot

    def check(self, slot, length):
        assert not self.broken, "after half a step, nobody knows what the cache holds"
        if self.window is not None and 0 < length < len(self.held[slot]) - self.window:
            raise CacheMiss(f"{length} of {len(self.held[slot])}")

    def truncate(self, slot, length):
        self.check(slot, length)
        super().truncate(slot, length)
        del self.held[slot][length:]

    def fork(self, slot, length):
        self.check(slot, length)
        child = self.open()
        try:
            self.reserve(child, length)
        except BaseException:
            self.close(child)
            raise
        self.held[child] = self.held[slot][:length]
        return child

    def close(self, slot):
        super().close(slot)
        del self.held[slot]


class Scripted:
    """``logits_of(tokens so far) -> [V]``. Checks every promise that the engine makes it.

    ``fail_at``: interrupts, once, when a row has so many tokens.
    """

    def __init__(self, logits_of=None, config=CONFIG, window=None, fail_at=None):
        self.config, self.window, self.fail_at = config, window, fail_at
        self.logits_of = logits_of or self.noise
        self.steps = []  # of every forward: by row, (past, new tokens)
        self.cache = None  # the newest

    def noise(self, tokens):
        digest = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).digest()
        seed = int.from_bytes(digest[:8], "little")
        return np.random.default_rng(seed).normal(size=self.config.vocab_size) * 2

    def new_cache(self, *, max_tokens):
        self.cache = History(max_tokens, self.window)
        return self.cache

    def forward(self, batch, cache, trace=None):
        past, starts, slots = batch.past.tolist(), batch.starts.tolist(), batch.slots.tolist()
        assert cache is self.cache and not cache.broken and len(set(slots)) == len(slots)
        rows, step = [], []
        for r, slot in enumerate(slots):
            held = cache.held[slot]
            new = batch.tokens[starts[r] : starts[r + 1]].tolist()
            assert len(held) == past[r], "the engine is wrong about what the cache holds"
            assert past[r] + len(new) <= cache.reserved[slot] and new
            step.append((past[r], len(new)))
            for i, token in enumerate(new, starts[r]):
                held.append(token)
                if self.fail_at == len(held):
                    self.fail_at, cache.broken = None, True
                    raise KeyboardInterrupt
                if i in batch.wanted:
                    rows.append(self.logits_of(held))
        assert sum(cache.reserved.values()) <= cache.max_tokens
        self.steps.append(step)
        return np.asarray(rows, np.float32).reshape(-1, self.config.vocab_size)

    def sample(self, logits, rules, uniforms):
        return sample_rows(logits, rules, uniforms)

    def to_numpy(self, logits):
        return np.asarray(logits, np.float32)


def slots_in_use(engine):
    """Slots of the cache that are neither remembered nor running: there should be none."""
    scheduler = engine.scheduler
    known = {row.slot for row in scheduler.running} | {n.slot for n in scheduler.prefixes.used}
    return set(scheduler.cache.reserved) - known
