"""A trace says what happened, and where two part: the token, the layer, the operation."""

import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.engine import Engine, Request
from gptoss.errors import GptOssError
from gptoss.model.reference import softmax
from gptoss.verify.diff import diff
from gptoss.verify.mutants import planted
from gptoss.verify.record import Recorder, record, replay, sketch
from gptoss.verify.trace import LAYER, POINTS, TraceFile, is_point
from tests.conftest import TINY

TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, 40).tolist()


def recorded(weights, tokens=TOKENS, points=(), room="reference"):
    how = {"dtype": "float32"} if room in ("torch", "mlx") else {}
    how |= {"device": "cpu"} if room == "mlx" else {}
    backend = load_backend(room, TINY, weights.__getitem__, **how)
    recorder = Recorder(backend, weights.__getitem__, points)
    replay(recorder, tokens)
    return recorder.trace(model="tiny")


@pytest.fixture(scope="module")
def right(weights):
    return recorded(weights, points=["attn.q", "attn.k", "logits"])


def test_what_is_kept_is_what_was(right, weights):
    a, T, L, H = right.arrays, len(TOKENS), TINY.num_hidden_layers, TINY.num_attention_heads
    assert right.tokens == TOKENS
    assert a["chosen"].shape == a["share"].shape == (T, L, TINY.experts_per_token)
    logprobs = np.log(softmax(a["point/logits"].astype(np.float64)))
    assert np.isnan(a["came"][0])
    came = logprobs[np.arange(T - 1), TOKENS[1:]]
    np.testing.assert_allclose(a["came"][1:], came, rtol=1e-4)
    assert np.array_equal(a["ids"][:, 0], logprobs.argmax(-1))
    q, k = a["point/block.1.attn.q"], a["point/block.1.attn.k"]  # a layer without a window
    scores = np.einsum("hd,nhd->hn", q[-1], np.repeat(k, 2, axis=1)) * TINY.head_dim**-0.5
    row = np.concatenate([scores, weights["block.1.attn.sinks"][:, None]], axis=1)
    np.testing.assert_allclose(a["sink"][-1, 1], softmax(row)[:, -1], rtol=1e-4, atol=1e-6)
    assert a["sink"].shape == (T, L, H)


@pytest.mark.parametrize("room", ["native", "torch", "mlx"])
def test_rooms_trace_alike(right, weights, room):
    if room != "native":
        pytest.importorskip({"mlx": "mlx.core"}.get(room, room))
    found = diff(right, recorded(weights, room=room), 1e-3)
    assert found.token is None and found.tokens is None


@pytest.mark.parametrize(
    "bug, point, token",
    [
        ("no sink", "block.0.attn.mixed", 0),
        ("window of one key more", ".attn.mixed", TINY.sliding_window),  # faint in layer 0
        ("every layer slides", "block.1.attn.mixed", TINY.sliding_window),
        ("softmax before top-k", "block.0.mlp.share", 0),
        ("no final norm", "norm", 0),
    ],
)
def test_a_bug_is_found_at_its_token_layer_and_operation(right, weights, bug, point, token):
    with planted(bug):
        other = recorded(weights)
    found = diff(right, other, 1e-5)
    assert found.token == token and found.point.endswith(point)
    assert found.tokens is None and found.size > 1e-5


def test_an_edited_token_shows_where_it_stands(right, weights):
    other = [*TOKENS[:17], (TOKENS[17] + 1) % TINY.vocab_size, *TOKENS[18:]]
    found = diff(right, recorded(weights, other))
    assert (found.tokens, found.token, found.point) == (17, 17, "embedding")
    assert found.likeliest is not None and found.likeliest >= 17
    assert diff(right, recorded(weights, TOKENS[:30])).tokens == 30


def test_a_point_is_known_by_its_name(right):
    names = right.about["points"]
    assert all(map(is_point, names))
    assert {name.removeprefix("block.0.") for name in names if "block.0." in name} == {*LAYER}
    assert {name for name in names if "block" not in name} == {*POINTS}
    assert all(map(is_point, LAYER))
    assert not any(map(is_point, ("q", "block", "block.0.q", "block.x.attn.q", "blocks.0", "")))


def test_a_trace_comes_back_from_its_file(tmp_path, right):
    right.save(tmp_path / "a.npz")
    again = TraceFile.load(tmp_path / "a.npz")
    assert again.about == right.about
    assert all(np.array_equal(again.arrays[n], x, equal_nan=True) for n, x in right.arrays.items())
    (tmp_path / "b").write_text("nothing")
    with pytest.raises(GptOssError, match="is no trace"):
        TraceFile.load(tmp_path / "b")


def test_recording_changes_no_answer_and_holds_the_last_one_only(weights):
    requests = [Request(prompt=TOKENS[:n], max_tokens=9) for n in (12, 12, 20)]
    plain = Engine(load_backend("reference", TINY, weights.__getitem__), max_tokens=100)
    wanted = [[drawn.token for drawn in plain.submit(request)] for request in requests]
    engine = Engine(load_backend("reference", TINY, weights.__getitem__), max_tokens=100)
    recorder = Recorder(engine.backend, weights.__getitem__)
    with pytest.raises(GptOssError, match="nothing to trace"):
        recorder.trace()
    record(engine, recorder)
    for request, answer in zip(requests, wanted, strict=True):
        assert [drawn.token for drawn in engine.submit(request)] == answer
        kept = recorder.trace()
        assert kept.tokens == [*request.prompt, *answer[:-1]]
        assert kept.about["prompt"] == len(request.prompt)
        found = diff(kept, recorded(weights, kept.tokens))
        assert found.token is None and found.tokens is None


def test_a_sketch_differs_as_much_as_the_values():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((200, 3000))
    y = x + 0.01 * draw.standard_normal(x.shape)
    apart = np.sqrt(np.mean((sketch(x) - sketch(y))[:, 1:] ** 2))
    assert apart == pytest.approx(0.01, rel=0.2)
    assert sketch(x)[:, 0] == pytest.approx(1.0, rel=0.1)
