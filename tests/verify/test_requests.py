"""Every request is recorded, whoever runs beside it; and nobody is answered otherwise for it."""

from contextlib import closing

import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.backends.protocol import Sampling
from gptoss.engine import Engine, Request
from gptoss.verify import requests as room
from gptoss.verify.diff import diff
from gptoss.verify.record import Recorder, replay
from gptoss.verify.requests import Requests
from gptoss.verify.traces import Traces, Writer
from tests.conftest import TINY

DRAW = np.random.default_rng(1)
LOUD = Sampling(temperature=1.5)
PROMPTS = [DRAW.integers(0, TINY.vocab_size, n).tolist() for n in (5, 40, 13)]


@pytest.fixture
def writer(tmp_path):
    with closing(Writer(tmp_path / "served")) as writer:
        yield writer


def engine_of(weights, **how):
    return Engine(load_backend("reference", TINY, weights.__getitem__), **{"max_tokens": 200} | how)


def asked():
    one, two, three = PROMPTS
    return [
        Request(prompt=one, max_tokens=12, id="one"),
        Request(prompt=two, max_tokens=9, id="two"),
        Request(prompt=three, max_tokens=10, n=3, sampling=LOUD, seed=3, id="three"),
        Request(prompt=two[:30] + one, max_tokens=3, id="four"),  # begins as another does
    ]


def answered(engine):
    streams = [engine.submit(request) for request in asked()]
    for stream in streams:
        list(stream)
    return [[answer.tokens for answer in stream.answers] for stream in streams]


def alone(weights, tokens):
    """The trace of these tokens when nobody else is there."""
    recorder = Recorder(load_backend("reference", TINY, weights.__getitem__), weights.__getitem__)
    replay(recorder, tokens)
    return recorder.trace()


# Together; in small steps; with so little room that some begin anew; parts of four tokens.
@pytest.mark.parametrize("how, part", [({}, 256), ({"step_tokens": 6}, 4), ({"max_tokens": 66}, 4)])
def test_each_trace_is_what_it_would_be_alone(weights, writer, monkeypatch, how, part):
    monkeypatch.setattr(room, "PART", part)
    plain, engine = engine_of(weights, **how), engine_of(weights, **how)
    requests = Requests(engine, weights.__getitem__, writer, ["attn.q"], model="tiny")
    requests.attach()
    answers = answered(engine)
    assert answers == answered(plain)
    assert not requests.live
    if "max_tokens" in how:
        assert engine.stats.preempted > 0, "nobody lost his room"
    traces = Traces(writer.path)
    names = ["one", "two", "three", "three.1", "three.2", "four"]
    assert sorted(traces.names) == sorted(names)
    whole = [
        (request.prompt, tokens)
        for request, rows in zip(asked(), answers, strict=True)
        for tokens in rows
    ]
    expected = {(*prompt, *tokens[:-1]) for prompt, tokens in whole}
    found = {tuple(traces.load(name).tokens) for name in names}
    assert found == expected
    for name in names:
        trace = traces.load(name)
        other = alone(weights, trace.tokens)
        assert diff(trace, other).same
        for array in ("came", "sink", "share"):
            np.testing.assert_allclose(
                trace.arrays[array], other.arrays[array], rtol=1e-3, atol=1e-5
            )
        assert trace.about["model"] == "tiny" and "point/block.0.attn.q" in trace.arrays
    assert traces.load("two").about["prompt"] == traces.size("two")[1] == len(PROMPTS[1])


def test_keys_take_no_more_than_they_may(weights, writer, monkeypatch):
    plain = answered(engine_of(weights))
    monkeypatch.setattr(room, "KEYS", 0)
    engine = engine_of(weights)
    Requests(engine, weights.__getitem__, writer).attach()
    assert answered(engine) == plain
    trace = Traces(writer.path).load("two")
    assert np.isnan(trace.arrays["sink"][-1]).all()
    assert diff(trace, alone(weights, trace.tokens)).same


@pytest.mark.parametrize("part", [256, 4])
def test_a_file_takes_no_more_than_it_may(weights, writer, tmp_path, monkeypatch, caplog, part):
    monkeypatch.setattr(room, "PART", part)
    plain, engine = answered(engine_of(weights)), engine_of(weights)
    Requests(engine, weights.__getitem__, writer).attach()
    assert answered(engine) == plain
    whole, engine = Traces(writer.path), engine_of(weights)
    with closing(Writer(tmp_path / "small", writer.size // 2)) as small:
        requests = Requests(engine, weights.__getitem__, small)
        requests.attach()
        assert answered(engine) == plain
    assert requests.over and 0 < small.path.stat().st_size <= small.most
    assert 0 < len(Traces(small.path).names) <= len(whole.names)
    assert "requests are served and no longer recorded" in caplog.text


def test_a_full_disk_ends_the_recording_and_not_the_service(weights, writer, caplog):
    resource = pytest.importorskip("resource")  # not on Windows
    plain, engine = answered(engine_of(weights)), engine_of(weights)
    Requests(engine, weights.__getitem__, writer).attach()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        assert answered(engine) == plain
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "takes no more (File too large)" in caplog.text
    assert Traces(writer.path).names == []


def test_what_was_cancelled_is_kept_as_far_as_it_came(weights, writer):
    engine = engine_of(weights)
    Requests(engine, weights.__getitem__, writer).attach()
    stream = engine.submit(Request(prompt=PROMPTS[0], max_tokens=50))
    for _ in range(4):
        next(stream)
    stream.cancel()
    traces = Traces(writer.path)
    assert traces.names == ["request-0"]
    assert traces.load("request-0").tokens == [*PROMPTS[0], *stream.answers[0].tokens[:3]]
