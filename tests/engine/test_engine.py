"""Whatever happens around a request, its answer is the one it would have had alone."""

import functools
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.backends import has_native, load_backend
from gptoss.backends.protocol import Sampling
from gptoss.engine import Engine, Request
from gptoss.engine.scheduler import AHEAD
from gptoss.errors import CacheFull, ContextExceeded, GptOssError
from tests.engine.scripted import CONFIG, Scripted, slots_in_use

V, ROOM = CONFIG.vocab_size, CONFIG.context_length
FREE = Sampling()
SMALL = 6  # tokens that are drawn: n-grams come again, and guesses have something to go by
RULES = [
    Sampling(temperature=0.0),
    FREE,
    Sampling(temperature=0.5),
    Sampling(temperature=1.3, top_k=4, top_p=0.9, min_p=0.02),
]


@pytest.fixture(scope="module", autouse=True)
def guessing():
    """Guesses after two tokens and in any crowd: here they matter, not whether they pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptoss.engine.speculate.GRAM", 2)
        patch.setattr("gptoss.engine.scheduler.CROWD", 99)
        yield


class Even:
    """A constraint: the parity of tokens alternates, and ``forced`` names what has no choice."""

    def __init__(self, state=0, size=V, forcing=True):
        self.state, self.size, self.forcing = state, size, forcing

    def mask(self):
        allowed = np.arange(self.size) % 2 == self.state % 2
        if self.state % 5 == 4:
            allowed[:] = False
            allowed[self.state % SMALL] = True
        return None if self.state % 7 == 3 else allowed

    def accept(self, token):
        assert self.mask() is None or self.mask()[token]
        self.state += 1

    def fork(self):
        return Even(self.state, self.size, self.forcing)

    def forced(self):
        return [self.state % SMALL] if self.forcing and self.state % 5 == 4 else []


@functools.cache
def after(a, b):
    return np.random.default_rng(a * V + b).normal(size=V) * 2


def markov(tokens):
    """Logits that look two tokens back only."""
    return after(*([0, *tokens])[-2:]).copy()


def answers(stream):
    for _ in stream:
        pass
    return [a.tokens for a in stream.answers]


def alone(request, backend=None, **engine):
    """Whole prompts, no neighbours, nothing remembered, no guesses."""
    request = replace(request, speculate=False, boundaries=(), timeout=None)
    engine = {"vocab_size": SMALL, "step_tokens": 1000, "max_tokens": 4000} | engine
    return answers(Engine(backend or Scripted(markov), **engine).submit(request))


PROMPTS = st.lists(st.integers(0, SMALL - 1), min_size=1, max_size=24)


@st.composite
def requests(draw):
    prompt = draw(PROMPTS)
    how = draw(st.sampled_from(["one", "one", "one", "n", "best", "beams"]))
    n = draw(st.integers(1, 3))
    rows = {"one": {}, "n": {"n": n}, "best": {"n": n, "best_of": n + 1}}
    return Request(
        prompt=prompt,
        sampling=draw(st.sampled_from(RULES)),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(1, 16)),
        min_tokens=draw(st.sampled_from([0, 0, 1])),
        stop_tokens=draw(st.sampled_from([frozenset(), frozenset({1})])),
        boundaries=draw(st.lists(st.integers(1, len(prompt)), max_size=2)),
        constraint=draw(st.sampled_from([None, None, Even()])) if how != "beams" else None,
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
        remember=draw(st.booleans()),
        **rows.get(how, {"n": n, "beams": n + 1}),
    )


@st.composite
def squeezes(draw):
    return {
        "step_tokens": draw(st.sampled_from([1, 2, 5, 40])),
        "rows": draw(st.sampled_from([1, 3, 8])),
        "max_tokens": draw(st.sampled_from([40, 60, 200])),
        "vocab_size": SMALL,
    }


@settings(max_examples=100)
@given(
    st.lists(requests(), min_size=1, max_size=6),
    squeezes(),
    st.sampled_from([None, 3, 9]),
    st.data(),
)
def test_no_schedule_changes_an_answer_or_leaks_a_slot(asked, squeeze, window, data):
    with patch("gptoss.engine.scheduler.WORTH", data.draw(st.sampled_from([1, 32]))):
        scheduled(asked, squeeze, window, data)


def scheduled(asked, squeeze, window, data):
    engine = Engine(Scripted(markov, window=window), **squeeze)
    streams, cancelled, stopped = [], set(), set()
    for request in asked:
        streams.append(engine.submit(request))
        for _ in range(data.draw(st.integers(0, 12))):
            engine.step()
        if data.draw(st.integers(0, 5)) == 0:
            victim = data.draw(st.integers(0, len(streams) - 1))
            cancelled |= {victim} if streams[victim].finish is None else set()
            streams[victim].cancel()
        if data.draw(st.integers(0, 5)) == 0:
            victim = data.draw(st.integers(0, len(streams) - 1))
            stopped.add(victim)
            streams[victim].stop(len(streams[victim].answers) - 1)
        assert not slots_in_use(engine)
    for i, (request, stream) in enumerate(zip(asked, streams, strict=True)):
        truth, got = alone(request), answers(stream)
        if i in cancelled or i in stopped:
            assert stream.finish == "cancelled" or i in stopped
            assert all(b == a for a, b in list(zip(truth, got, strict=True))[:-1]) or i in cancelled
            assert all(b == a[: len(b)] for a, b in zip(truth, got, strict=True))
        else:
            assert got == truth and stream.finish in ("stop", "length")
    assert not engine.step() and not slots_in_use(engine)
    assert engine.stats.running == engine.stats.waiting == 0
    assert engine.stats.remembered_tokens == sum(engine.scheduler.cache.reserved.values())
    engine.clear()
    assert not engine.scheduler.cache.reserved and not engine.scheduler.prefixes.root.children


@pytest.fixture(scope="module", params=["native", "torch", "reference"])
def room(request, tiny):
    """A backend whose answers hang on every bit of its cache."""
    from gptoss.model.weights import random_weights

    weights = random_weights(tiny, dtype=np.float64 if request.param != "native" else np.float32)
    if request.param == "native":
        if not has_native():
            pytest.skip("gptoss was installed without its compiled core")
        return load_backend("native", tiny, weights.__getitem__, precision="exact", threads=1)
    if request.param == "torch":
        pytest.importorskip("torch").set_num_threads(1)
    return load_backend(request.param, tiny, weights.__getitem__, dtype="float64")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "squeeze",
    [{}, {"step_tokens": 7}, {"max_tokens": 300, "rows": 4}, {"rows": 2, "step_tokens": 64}],
    ids=["whole", "chunked", "preempted", "few"],
)
def test_batching_never_changes_the_answer(room, squeeze, seed):
    """The past of each prompt is longer than the window; some share most of it."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, V, 90).tolist()
    asked = [
        Request(
            prompt=[*common[: rng.integers(1, 90)], *rng.integers(0, 8, rng.integers(1, 30))],
            sampling=RULES[i % len(RULES)],
            seed=i,
            max_tokens=int(rng.integers(1, 40)),
            boundaries=[1],
            n=1 + (i == 3),
            beams=2 if i == 5 else 0,
        )
        for i in range(8)
    ]
    engine = Engine(room, vocab_size=12, **squeeze)
    streams = []
    for request in asked:
        streams.append(engine.submit(request))
        engine.step()
    for request, stream in zip(asked, streams, strict=True):
        assert answers(stream) == alone(request, room, vocab_size=12), request
    stats = engine.stats
    assert stats.reused > 0
    assert stats.drafted > stats.accepted > 0 or squeeze.get("step_tokens") == 7  # no room for any
    assert not slots_in_use(engine)
    if "max_tokens" in squeeze:
        assert stats.preempted > 0


# --- who runs next


def test_prompts_are_read_in_chunks_beside_those_who_draw():
    backend = Scripted(markov)
    engine = Engine(backend, step_tokens=10)
    first = engine.submit(Request(prompt=[1], max_tokens=20, speculate=False))
    engine.step()
    second = engine.submit(Request(prompt=[2] * 30, max_tokens=2))
    for _ in range(3):
        before = first.completion
        engine.step()
        assert first.completion == before + 1, "a long prompt must not stop others"
    assert backend.steps[1:4] == [[(1 + i, 1), (9 * i, 9)] for i in range(3)]
    assert not second.completion
    engine.step()
    assert second.completion == 1


def test_first_come_first_served():
    engine = Engine(Scripted(markov), rows=2)
    streams = [
        engine.submit(Request(prompt=[i], max_tokens=4 + i, speculate=False)) for i in range(5)
    ]
    ended = []
    while engine.step():
        started = [i for i, s in enumerate(streams) if s.completion]
        assert started == [*range(len(started))] and len(started) <= len(ended) + 2
        ended += [i for i, s in enumerate(streams) if s.finish and i not in ended]
    assert ended == [0, 1, 2, 3, 4]


def test_nobody_starves_where_steps_are_small():
    engine = Engine(Scripted(markov), step_tokens=3, rows=8)
    long = engine.submit(Request(prompt=[0] * 40, max_tokens=1))
    short = [engine.submit(Request(prompt=[1, i], max_tokens=9)) for i in range(3)]
    for _ in range(40):
        running = {row: row.held for row in engine.scheduler.running}
        engine.step()
        assert all(row.held > held for row, held in running.items() if row.slot is not None)
    assert long.finish and all(s.finish for s in short)


def test_the_last_to_come_is_preempted_and_still_answers():
    engine = Engine(Scripted(markov), max_tokens=50)
    asked = [Request(prompt=[i] * 10, max_tokens=20, sampling=FREE, seed=i) for i in range(4)]
    streams = [engine.submit(r) for r in asked]
    while engine.step():
        pass
    assert engine.stats.preempted and not streams[0].recomputed
    assert engine.stats.recomputed == sum(s.recomputed for s in streams)
    assert [answers(s) for s in streams] == [alone(r, vocab_size=V) for r in asked]


def test_a_row_that_was_preempted_is_not_preempted_again_at_once():
    """Room comes in pieces, so that two who fill the cache do not take turns at every token."""
    engine = Engine(Scripted(markov, replace(CONFIG, initial_context_length=2048)), max_tokens=640)
    for i in range(2):
        engine.submit(Request(prompt=[i] * 200, max_tokens=300, remember=False))
    while engine.step():
        pass
    assert 1 <= engine.stats.preempted <= 2 * 300 // AHEAD


# --- endings


def test_the_rows_of_a_cancelled_request_are_gone_at_once():
    engine = Engine(Scripted(markov), rows=2, max_tokens=200)
    streams = [engine.submit(Request(prompt=[i], remember=False)) for i in range(3)]
    engine.step()
    for stream in streams:
        stream.cancel()
        stream.cancel()
    assert not engine.step() and not engine.scheduler.cache.reserved
    assert [(s.finish, len(list(s))) for s in streams] == [("cancelled", n) for n in (1, 1, 0)]


def test_one_of_several_answers_can_be_ended():
    request = Request(prompt=[1], n=3, max_tokens=20, sampling=Sampling(), seed=4)
    engine = Engine(Scripted(markov), vocab_size=SMALL)
    stream = engine.submit(request)
    stream.stop(2)  # nothing was drawn: there are no three yet
    for _ in range(4):
        engine.step()
    stream.stop(1)
    stream.stop(1)
    assert len(engine.scheduler.running) == 2 and not slots_in_use(engine)
    first, second, third = alone(request)
    assert answers(stream) == [first, second[: len(stream.answers[1].tokens)], third]
    assert [a.finish for a in stream.answers] == ["length", "stop", "length"]
    assert len(stream.answers[1].tokens) < 20 and stream.finish == "length"


def test_a_listener_ends_an_answer_at_its_token():
    """With guesses behind it that would have been right."""
    found = []

    def listen(drawn):
        if drawn is not None and drawn.row == 1 and drawn.token == 5:
            found.append(drawn)
            stream.stop(1)

    engine = Engine(Scripted(lambda tokens: np.eye(64)[(tokens[-1] + 1) % 9] * 9))
    stream = engine.submit(Request(prompt=[1], n=2, max_tokens=40), listen)
    assert [len(a) for a in answers(stream)] == [40, 4] and len(found) == 1
    assert stream.answers[1].tokens == [2, 3, 4, 5] and not slots_in_use(engine)


def test_leaving_a_with_block_cancels():
    engine = Engine(Scripted(markov))
    with engine.submit(Request(prompt=[1])) as stream:
        next(stream)
    assert stream.finish == "cancelled" and not engine.step()


def test_deadlines_end_who_runs_and_who_waits():
    now = 0.0
    engine = Engine(Scripted(markov), rows=1, clock=lambda: now)
    a, b = (engine.submit(Request(prompt=[i], timeout=5.0)) for i in range(2))
    c = engine.submit(Request(prompt=[3], max_tokens=2, timeout=9.0))
    engine.step()
    now = 5.0
    assert len(list(c)) == 2
    assert (a.finish, b.finish, c.finish) == ("deadline", "deadline", "length")
    assert a.completion == 1 and not b.completion
    assert not engine.step() and not engine.deadlines


def test_an_answer_ends_where_the_room_does():
    engine = Engine(Scripted(), max_tokens=10)
    for prompt, limit, length in (([1] * 7, None, 4), ([1] * 10, None, 1), ([1] * 7, 2, 2)):
        stream = engine.submit(Request(prompt=prompt, max_tokens=limit))
        assert len(list(stream)) == length and stream.finish == "length"  # the last is never fed


def test_one_sequence_may_have_less_than_the_room():
    engine = Engine(Scripted(), max_tokens=40, longest=10)
    assert len(list(engine.submit(Request(prompt=[1] * 7)))) == 4
    with pytest.raises(ContextExceeded, match="more than the 10 there is room for"):
        engine.submit(Request(prompt=[1] * 11))
    with pytest.raises(ValueError, match="longest must be at least 1"):
        Engine(Scripted(), longest=0)


def test_errors_of_the_backend_end_the_requests_of_the_step_only():
    backend = Scripted(markov)
    engine = Engine(backend, rows=2)
    streams = [engine.submit(Request(prompt=[i], max_tokens=5)) for i in range(3)]
    engine.step()
    forward, backend.forward = backend.forward, lambda *_: 1 / 0
    assert engine.step()
    backend.forward = forward
    assert answers(streams[2]) == alone(streams[2].request, vocab_size=V)
    for stream in streams[:2]:
        assert next(stream).row == 0 and stream.finish == "error"
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert not slots_in_use(engine) and engine.stats.remembered == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_ends_its_request_and_no_neighbours(bad):
    def logits_of(tokens):
        row = markov(tokens)
        row[V - 1] = bad if tokens[0] == 1 and len(tokens) > 3 else 0.0
        return row

    engine = Engine(Scripted(logits_of))
    asked = [Request(prompt=[i], max_tokens=6, n=2, sampling=FREE) for i in range(3)]
    streams = [engine.submit(r) for r in asked]
    with pytest.raises(GptOssError, match="NaN or infinity.*inspect --check"):
        answers(streams[1])
    assert streams[1].finish == "error" and len(streams[1].answers[0].tokens) == 3
    for i in (0, 2):
        assert answers(streams[i]) == alone(asked[i], Scripted(logits_of), vocab_size=V)
    assert engine.stats.remembered == 4, "what may hold NaN is not remembered"
    assert np.isfinite(engine.logits([2, 2, 2, 2])[:, : V - 1]).all()
    with pytest.raises(GptOssError, match="NaN"):
        engine.logits([1] * 5)
    assert not slots_in_use(engine)


def test_padding_may_hold_anything():
    row = np.concatenate([np.zeros(V - 2), [np.nan, np.inf]])
    engine = Engine(Scripted(lambda _: row), vocab_size=V - 2)
    [drawn] = engine.submit(Request(prompt=[1], max_tokens=1, logprobs=0, sampling=FREE))
    assert drawn.logprob == pytest.approx(-np.log(V - 2)) and drawn.token < V - 2


def test_a_listener_hears_every_token_and_the_end_once():
    heard = []
    stream = Engine(Scripted()).submit(Request(prompt=[1], max_tokens=3), heard.append)
    assert [*stream, None] == heard


def test_a_listener_that_fails_ends_its_own_request():
    def fail(drawn):
        raise RuntimeError("nobody is there")

    engine = Engine(Scripted(markov))
    bad = engine.submit(Request(prompt=[1]), fail)
    good = engine.submit(Request(prompt=[2], max_tokens=4))
    assert len(list(good)) == 4 and bad.finish == "error" and bad.completion == 1
    assert not slots_in_use(engine)


def test_a_listener_may_cancel_at_any_token():
    def logits_of(tokens):  # counts, but for what no guess foresees
        return np.eye(V)[5 if len(tokens) % 7 == 0 else len(tokens) % 3] * 9

    def stop(drawn):
        if stream.completion == at:
            stream.cancel()

    for at in range(1, 12):
        engine = Engine(Scripted(logits_of))
        stream = engine.submit(Request(prompt=[0, 1, 2, 0, 1, 2]), stop)
        assert len(list(stream)) == at and stream.finish == "cancelled"
        again = Request(prompt=[0, 1, 2, 0, 1, 2, *stream.answers[0].tokens], max_tokens=9)
        assert answers(engine.submit(again)) == alone(again, Scripted(logits_of), vocab_size=V)


@pytest.mark.parametrize("where", [1, 3, 5, 6])
def test_after_an_interrupt_everybody_gets_his_answer(where):
    asked = [Request(prompt=[1, 2, 3, 4], max_tokens=4), Request(prompt=[3], max_tokens=6)]
    engine = Engine(Scripted(markov, fail_at=where), step_tokens=4, vocab_size=SMALL)
    streams = [engine.submit(r) for r in asked]
    with pytest.raises(KeyboardInterrupt):
        while engine.step():
            pass
    assert [answers(s) for s in streams] == [alone(r) for r in asked]
    assert not slots_in_use(engine)


# --- what is refused


def test_a_prompt_beyond_the_context_names_both_numbers():
    with pytest.raises(ContextExceeded, match=rf"{ROOM + 1} tokens.*context of {ROOM}"):
        Engine(Scripted()).submit(Request(prompt=[1] * (ROOM + 1)))
    with pytest.raises(ContextExceeded, match=rf"11 tokens.*10 there is room.*context is {ROOM}"):
        Engine(Scripted(), max_tokens=10).submit(Request(prompt=[1] * 11))


@pytest.mark.parametrize("prompt, said", [([1, V], f"token {V}"), ([-1], "token -1")])
def test_a_prompt_that_no_model_can_read_is_refused_at_once(prompt, said):
    with pytest.raises(ValueError, match=said):
        Engine(Scripted()).submit(Request(prompt=prompt))
    with pytest.raises(ValueError, match=said):
        Engine(Scripted()).logits(prompt)


@pytest.mark.parametrize("token", [-1, SMALL])
def test_a_bias_on_no_token_is_refused(token):
    with pytest.raises(ValueError, match=f"logit_bias: token {token}"):
        Engine(Scripted(), vocab_size=SMALL).submit(Request(prompt=[1], logit_bias={token: 1.0}))


@pytest.mark.parametrize(
    "wrong",
    [{"vocab_size": 0}, {"vocab_size": V + 1}, {"max_tokens": 0}, {"step_tokens": 0}, {"rows": 0}],
)
def test_an_engine_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Engine(Scripted(), **wrong)


def test_a_cache_smaller_than_it_says_is_an_error_and_no_hang():
    backend = Scripted()
    engine = Engine(backend)
    backend.cache.max_tokens = 3
    with pytest.raises(CacheFull, match="no room for 5"):
        list(engine.submit(Request(prompt=[1] * 5)))
    assert len(list(engine.submit(Request(prompt=[1], max_tokens=1)))) == 1


def test_logits_are_those_after_each_token(room):
    tokens = list(range(11))
    engine = Engine(room, step_tokens=4)
    logits = engine.logits(tokens)
    assert logits.shape == (11, 64) and logits.dtype == np.float32
    for n in (1, 6, 11):
        np.testing.assert_allclose(Engine(room).logits(tokens[:n])[-1], logits[n - 1], atol=1e-5)
    stream = engine.submit(Request(prompt=[*tokens, 1], max_tokens=1))
    assert [d.token for d in stream] == [int(engine.logits([*tokens, 1])[-1].argmax())]
    assert stream.reused == 11
