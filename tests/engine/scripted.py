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

    def truncate(self, slot, length):
        held = self.held[slot]
        assert not (self.broken and length), "after half a step, nobody knows what the cache holds"
        self.broken = False
        if self.window is not None and 0 < length < len(held) - self.window:
            raise CacheMiss(f"{length} of {len(held)}")
        super().truncate(slot, length)
        del held[length:]


class Scripted:
    """``logits_of(tokens so far) -> [V]``. Checks every promise that the engine makes it."""

    def __init__(self, logits_of=None, config=CONFIG, window=None, fail_at=None):
        self.config, self.window, self.fail_at = config, window, fail_at
        self.logits_of = logits_of or self.noise
        self.steps = []  # (past, new tokens) of every forward

    def noise(self, tokens):
        digest = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).digest()
        seed = int.from_bytes(digest[:8], "little")
        return np.random.default_rng(seed).normal(size=self.config.vocab_size) * 2

    def new_cache(self, *, max_tokens):
        return History(max_tokens, self.window)

    def forward(self, batch, cache, trace=None):
        [slot], [past] = batch.slots.tolist(), batch.past.tolist()
        held = cache.held[slot]
        assert len(held) == past, "the engine is wrong about what the cache holds"
        assert past + len(batch.tokens) <= cache.reserved[slot] <= cache.max_tokens
        self.steps.append((past, len(batch.tokens)))
        rows = []
        for i, token in enumerate(batch.tokens.tolist()):
            held.append(token)
            if self.fail_at == len(held):
                self.fail_at, cache.broken = None, True
                raise KeyboardInterrupt
            if i in batch.wanted:
                rows.append(self.logits_of(held))
        return np.asarray(rows, np.float32).reshape(-1, self.config.vocab_size)

    def sample(self, logits, rules, uniforms):
        return sample_rows(logits, rules, uniforms)

    def to_numpy(self, logits):
        return np.asarray(logits, np.float32)
