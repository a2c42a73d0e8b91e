"""Guesses make steps fewer and change nothing; that they change nothing is test_engine's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.backends.protocol import Sampling
from gptoss.engine import Engine, Request
from gptoss.engine.speculate import CROWD, GRAM, MOST, Lookup
from tests.engine.scripted import CONFIG, Scripted

V = CONFIG.vocab_size


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(0, 9), st.data())
def test_a_guess_is_what_followed_the_last_time(tokens, most, data):
    lookup = Lookup()
    for n in sorted(data.draw(st.sets(st.integers(1, len(tokens))))):  # grown by and by
        draft = lookup.draft(tokens[:n], most)
        end = tokens[max(0, n - GRAM) : n]
        places = [i for i in range(GRAM, n) if tokens[i - GRAM : i] == end]
        if not places or not most:
            assert draft == []
        else:
            assert draft == tokens[:n][places[-1] :][: min(most, lookup.width)] != []


def test_guesses_grow_while_right_and_rest_after_failing():
    lookup, tokens = Lookup(), [1, 2, 3, 4] * 10
    widths = []
    for _ in range(4):
        widths.append(len(lookup.draft(tokens, 99)))
        lookup.judge(widths[-1], widths[-1])
    assert widths == [2, 4, 4, 4] and lookup.width == MOST, "no further than the sequence goes"
    rests = []
    for _ in range(5):
        drafts = [lookup.draft(tokens, 99) for _ in range(99)]
        rests.append(next(i for i, draft in enumerate(drafts) if draft))
        lookup.rest = 0
        lookup.judge(2, 0)
    assert rests == [0, 1, 3, 7, 15]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_repeats_takes_fewer_steps(temperature):
    def logits_of(tokens):
        return np.eye(V)[tokens[-4]] * 20

    steps = []
    for speculate in (False, True):
        backend = Scripted(logits_of)
        stream = Engine(backend).submit(
            Request(
                prompt=[5, 6, 7, 8, 5, 6, 7],
                max_tokens=40,
                sampling=Sampling(temperature=temperature),
                speculate=speculate,
            )
        )
        drawn = [d.token for d in stream]
        assert drawn == ([8, 5, 6, 7] * 10)
        steps.append(len(backend.steps))
        assert stream.accepted <= stream.drafted
        assert (stream.drafted > 0) == speculate
    assert steps[0] == 40 and steps[1] < 20


def test_where_guesses_fail_there_are_few():
    def logits_of(tokens):
        """Never what followed the last time."""
        places = [i for i in range(GRAM, len(tokens)) if tokens[i - GRAM : i] == tokens[-GRAM:]]
        return np.eye(V)[(tokens[places[-1]] + 1) % 3 if places else 0]

    backend = Scripted(logits_of)
    stream = Engine(backend).submit(Request(prompt=[0, 1], max_tokens=60))
    assert len(list(stream)) == 60 and stream.accepted == 0
    guesses = [new - 1 for step in backend.steps[1:] for _, new in step]
    assert 3 <= sum(g > 0 for g in guesses) <= 7


def test_a_crowd_does_not_guess():
    backend = Scripted(lambda tokens: np.eye(V)[tokens[-1]] * 20)
    engine = Engine(backend, max_tokens=200)
    for i in range(CROWD + 1):
        engine.submit(Request(prompt=[i] * 9, max_tokens=9))
    while engine.step():
        pass
    assert engine.stats.drafted == 0


def test_guesses_take_nobodys_room():
    """They end where the answer, the step or the cache does."""
    for room, step in ((14, 64), (64, 3), (64, 2), (64, 1)):
        backend = Scripted(lambda tokens: np.eye(V)[tokens[-1]] * 20)
        engine = Engine(backend, max_tokens=room, step_tokens=step)
        streams = [engine.submit(Request(prompt=[3] * 5, max_tokens=8)) for _ in range(2)]
        assert [len(list(s)) for s in streams] == [8, 8]
        assert all(sum(new for _, new in s) <= step for s in backend.steps)
        assert engine.stats.preempted == 0 or room == 14
