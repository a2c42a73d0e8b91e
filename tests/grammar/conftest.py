"""Vocabularies and the judge from the tests of text, and a model that knows nothing."""

import numpy as np
import pytest

from gptoss.grammar import constraint
from gptoss.text.parser import Parser
from tests.text.conftest import harmony, nano, rank_folder, tokenizer  # noqa: F401


@pytest.fixture
def untried(monkeypatch):
    """Grammars are compiled here at once; test_trial.py has what the other process is for."""
    monkeypatch.setattr(constraint, "trial", lambda grammars, specials: "")


def babble(constraint, words, seed=0, patience=60):
    """A turn of tokens drawn evenly from the allowed; after ``patience``, rather what closes."""
    rng, drawn = np.random.default_rng(seed), []
    closes = np.zeros(words.vocab_size, bool)
    closes[list(words.specials.values())] = True
    closes[[i for b in b'"}]' for i in words.encode(chr(b))]] = True
    while not constraint.ended:
        allowed = constraint.mask()
        assert allowed.shape == (words.vocab_size,) and allowed.any()
        impatient = len(drawn) > patience and rng.random() < 0.8  # a closing may need more first
        if impatient and (allowed & closes).any():
            allowed = allowed & closes
        token = int(rng.choice(np.flatnonzero(allowed)))
        constraint.accept(token)
        drawn.append(token)
        assert len(drawn) < 5000, words.decode(drawn[-200:])
    return drawn


def read(tokens, words, tools=()):
    """The turn's messages; nothing in it had to be mended."""
    parser = Parser(words, tools=[tool.name for tool in tools])
    for token in tokens:
        parser.push(token)
    parser.finish()
    assert parser.repairs == [] and parser.tail == b"", words.decode(tokens)
    return parser.messages
