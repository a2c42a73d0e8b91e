"""A conversation of the nano model, longer than its window and than one traced step."""

import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.backends.protocol import Batch
from gptoss.checkpoint.open import open_checkpoint
from gptoss.llm.models import resolve
from gptoss.llm.tokens import load_tokenizer
from gptoss.sight.look import look

CONVERSATION = (
    "<|start|>user<|message|>What is 247 + 385?<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>247+385 by columns: ones 7+5=12 carry 1, "
    "tens 4+8+1=13 carry 1, hundreds 2+3+1=6. So 632.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>247 + 385 = 632<|end|>"
    "<|start|>user<|message|>Please reverse the word stone<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>s t o n e back: e n o t s<|end|>"
    "<|start|>assistant<|channel|>final<|message|>enots<|return|>"
)


class Nano:
    """The packaged model in the reference, and everything traced in one step over it all."""

    def __init__(self):
        checkpoint = open_checkpoint(resolve("nano"))
        self.config, self.weights = checkpoint.config, checkpoint.read
        self.tokenizer = load_tokenizer(checkpoint)
        self.tokens = self.tokenizer.encode_with_specials(CONVERSATION)
        self.backend = load_backend("reference", self.config, self.weights)
        self.traced = {}
        cache = self.backend.new_cache(max_tokens=len(self.tokens))
        batch = Batch.of([self.tokens], [0], [cache.open()], range(len(self.tokens)))
        self.logits = self.backend.forward(batch, cache, self.traced.__setitem__)
        self.sight = look(self.backend, self.weights, self.tokens)


@pytest.fixture(scope="session")
def nano():
    seen = Nano()
    assert len(seen.tokens) > 128 > seen.config.sliding_window
    return seen


@pytest.fixture(scope="session")
def probabilities(nano):
    """[T, V] of the model, in float64."""
    e = np.exp(nano.logits.astype(np.float64) - nano.logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
