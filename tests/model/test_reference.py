"""What must hold of the reference whatever the weights are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.backends.protocol import Batch
from gptoss.backends.reference import ReferenceBackend
from gptoss.model.config import gpt_oss_20b
from gptoss.model.mxfp4 import encode
from gptoss.model.reference import NumpyOps, attend_row, rope_tables, softmax, swiglu
from gptoss.model.weights import build, random_weights, specs
from tests.model.cases import SMALL, STORED, errors, reference_trace, vivid_weights

OPS = NumpyOps()


def logits(tokens: list[int], config: Any = SMALL, seed: int = 0) -> Any:
    """[T, V] in float64."""
    weights = vivid_weights(config, seed)
    return reference_trace(config, weights, [tokens], dtype="float64")["logits"]


def same(a: Any, b: Any) -> bool:
    """But for the order of summation: a token's neighbours at an expert differ from run to run."""
    return bool(np.abs(a - b).max() <= 1e-11 * np.abs(b).max())


# Causality and the window.


@given(
    tokens=st.lists(st.integers(0, SMALL.vocab_size - 1), min_size=2, max_size=20), data=st.data()
)
def test_changing_a_token_changes_nothing_before_it(tokens, data):
    at = data.draw(st.integers(1, len(tokens) - 1))
    other = [*tokens]
    other[at] = (tokens[at] + 1) % SMALL.vocab_size
    before, after = logits(tokens), logits(other)
    assert same(before[:at], after[:at])
    assert not same(before[at], after[at])


@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, None])
def test_a_window_is_so_many_keys_with_the_querys_own(window):
    """Key j is visible to query i when i - window < j <= i: its gradient is there or exactly 0."""
    rng = np.random.default_rng(0)
    n = 160
    q, k, v = rng.standard_normal((3, n, 1, 8))
    share = attend_row(q, k, np.eye(n)[:, None], np.zeros(1), window)[:, 0]  # [i, j], by values
    i, j = np.mgrid[:n, :n]
    assert np.array_equal(share > 0, (j <= i) & (j > i - (window or n)))


def test_the_published_window_sees_127_tokens_back_and_not_128():
    config = replace(SMALL, num_hidden_layers=1, sliding_window=gpt_oss_20b().sliding_window)
    tokens = np.random.default_rng(1).integers(1, config.vocab_size, 200).tolist()
    for back, sees in (127, True), (128, False):
        other = [*tokens]
        other[150 - back] = 0
        assert same(logits(tokens, config)[150], logits(other, config)[150]) is not sees


def test_full_layers_see_the_first_token_from_the_last():
    config = replace(SMALL, num_hidden_layers=2)
    tokens = [1] * 60
    assert not same(logits(tokens, config)[-1], logits([2, *tokens[1:]], config)[-1])


# Sinks.


@given(seed=st.integers(0, 1000), window=st.sampled_from([None, 1, 3]), t=st.integers(1, 9))
def test_a_sink_is_a_rescaling_by_the_sigmoid_of_logsumexp_minus_sink(seed, window, t):
    """And an all-zero key and value whose score is the sink: both as the fused kernels do it."""
    rng = np.random.default_rng(seed)
    H, K, n, d = 4, 2, 9, 8
    q, k, v = (rng.standard_normal((m, h, d)) for m, h in ((t, H), (n, K), (n, K)))
    sinks = 3.0 * rng.standard_normal(H)
    with_sinks = attend_row(q, k, v, sinks, window)

    age = np.arange(n - t, n)[:, None] - np.arange(n)
    seen = (age >= 0) & (age < (window or n))
    for h in range(H):
        scores = np.where(seen, q[:, h] @ k[:, h // 2].T / np.sqrt(d), -np.inf)  # [t, n]
        total = np.logaddexp.reduce(scores, axis=-1)
        plain = softmax(scores) @ v[:, h // 2]
        rescaled = plain / (1.0 + np.exp(sinks[h] - total))[:, None]
        np.testing.assert_allclose(with_sinks[:, h], rescaled, rtol=1e-13, atol=1e-15)
        row = np.concatenate([scores, np.full((t, 1), sinks[h])], axis=-1)
        zero = softmax(row) @ np.concatenate([v[:, h // 2], np.zeros((1, d))])
        np.testing.assert_allclose(with_sinks[:, h], zero, rtol=1e-13, atol=1e-15)


def test_an_endless_sink_takes_everything_and_a_bottomless_one_nothing():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 5, 2, 4))
    assert np.abs(attend_row(q, k, v, np.full(2, 1e4), None)).max() == 0.0
    kept = attend_row(q, k, np.ones_like(v), np.full(2, -1e4), None)
    np.testing.assert_allclose(kept, 1.0, rtol=1e-14)


# Positions.


def test_scores_depend_on_the_distance_between_two_positions_only():
    rng = np.random.default_rng(3)
    config = gpt_oss_20b()
    q, k = rng.standard_normal((2, 1, 1, config.head_dim))

    def score(i: int, j: int) -> float:
        a, b = (OPS.rope(x, np.array([at]), config) for x, at in ((q, i), (k, j)))
        return float((a * b).sum())

    assert score(5, 2) == pytest.approx(score(100_005, 100_002), rel=1e-9)
    assert score(5, 2) != pytest.approx(score(6, 2), rel=1e-3)


def test_the_released_models_turn_at_the_published_frequencies():
    """Untouched above the range, 32 times slower below it, and a ramp that starts unrounded."""
    config = gpt_oss_20b()
    cos, sin = (x[0, 0] for x in rope_tables(np.array([1]), config, np.float64))
    concentration = 0.1 * np.log(32.0) + 1.0
    assert concentration == pytest.approx(1.3465736, abs=1e-7)
    np.testing.assert_allclose(np.hypot(cos, sin), concentration, rtol=1e-14)
    plain = 150_000.0 ** (-np.arange(32) / 32)
    slower = plain / np.arctan2(sin, cos)
    np.testing.assert_allclose(slower[:9], 1.0, rtol=1e-12)
    np.testing.assert_allclose(slower[18:], 32.0, rtol=1e-9)
    ramp = (9 - 8.0928) / (17.3980 - 8.0928)
    assert 1.0 / slower[9] == pytest.approx(1 - ramp + ramp / 32, rel=1e-5)


# Routing and experts.


@given(
    scores=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=4, max_size=40),
    k=st.integers(1, 4),
)
def test_the_best_experts_first_and_of_equals_the_lower_index(scores, k):
    chosen, share = OPS.route(np.array([scores]), k)
    wanted = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]
    assert chosen[0].tolist() == wanted
    assert share.sum() == pytest.approx(1.0)
    assert (np.diff(share[0]) <= 0).all()


def test_swiglu_follows_its_formula_and_never_overflows():
    x = np.array([[-1e4, 3.0, 1e4, -1e4, 7.0, 7.0, 9.0, 9.0, -2.0, -1.0]], np.float32)
    gate = 7.0 / (1.0 + np.exp(-1.702 * 7.0))
    wanted = [[0.0, gate * -6.0, gate * 8.0, gate * 8.0, 0.0]]
    np.testing.assert_allclose(swiglu(x, 7.0), wanted, rtol=1e-6, atol=1e-12)


def test_packed_experts_answer_like_their_decoded_selves():
    config = STORED["packed"].config
    packed = vivid_weights(config, 1, packed=True)
    dense = {n: x if isinstance(x, np.ndarray) else x.decode() for n, x in packed.items()}
    rows = [[1, 2, 3, 4, 5]]
    a, b = (reference_trace(config, w, rows) for w in (packed, dense))
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_packing_weights_keeps_the_model_close():
    weights = vivid_weights(SMALL, 5)
    packed = {
        n: encode(x) if n.endswith(("1_weight", "2_weight")) else x for n, x in weights.items()
    }
    here = "block.0.mlp.out"
    a, b = (reference_trace(SMALL, w, [[1, 2, 3]])[here] for w in (packed, weights))
    assert 0.01 < np.abs(a - b).max() / np.abs(b).max() < 0.3


# Batches, steps and precision.


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    pieces=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_neighbours_and_chunks_never_change_an_answer(lengths, pieces, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, SMALL.vocab_size, n).tolist() for n in lengths]
    rows = [row * pieces for row in rows]  # so that every piece has a token of every row
    weights = vivid_weights(SMALL, 0)
    together = reference_trace(SMALL, weights, rows, dtype="float64", pieces=pieces)
    alone = [reference_trace(SMALL, weights, [row], dtype="float64") for row in rows]
    for name, x in together.items():
        wanted = np.concatenate([trace[name] for trace in alone])
        assert same(x, wanted), name


@pytest.mark.parametrize("name", STORED)
def test_float32_agrees_with_float64_to_its_own_rounding(name):
    case = STORED[name]
    narrow, wide = (
        reference_trace(case.config, case.weights, case.tokens, dtype=dtype)
        for dtype in ("float32", "float64")
    )
    for point in narrow:
        if not point.endswith(".chosen"):
            assert narrow[point].dtype == np.float32, point
            assert wide[point].dtype == np.float64, point
    found = errors(narrow, wide)
    assert max(found.values()) < 1e-5, max(found.items(), key=lambda item: item[1])
    assert found["logits"] > 0.0


def test_only_wanted_tokens_get_logits_and_tracing_changes_none():
    case = STORED["odd"]
    backend = ReferenceBackend(case.config, case.weights.__getitem__)
    every = reference_trace(case.config, case.weights, case.tokens)["logits"]
    for wanted in [16], [3, 0, 3], list(range(17)):
        cache = backend.new_cache(max_tokens=17)
        found = backend.forward(Batch.of(case.tokens, [0], [cache.open()], wanted=wanted), cache)
        np.testing.assert_allclose(found, every[wanted], rtol=1e-5, atol=1e-6)


# The table of tensors.


def test_every_tensor_is_asked_for_once_and_in_the_order_of_the_table():
    asked: list[str] = []
    build(SMALL, asked.append)
    assert sorted(asked) == sorted(spec.name for spec in specs(SMALL))
    assert len(asked) == len(set(asked))
    assert asked[0] == "embedding.weight" and asked[-1] == "unembedding.weight"


def test_random_weights_follow_the_table_and_their_seed():
    weights = random_weights(SMALL, seed=3)
    assert {n: x.shape for n, x in weights.items()} == {s.name: s.shape for s in specs(SMALL)}
    again, other = random_weights(SMALL, seed=3), random_weights(SMALL, seed=4)
    assert all(np.array_equal(x, again[n]) for n, x in weights.items())
    assert not any(np.array_equal(x, other[n]) for n, x in weights.items())
    halves = random_weights(SMALL, seed=3, dtype=np.float16)
    assert all(np.array_equal(x.astype(np.float16), halves[n]) for n, x in weights.items())
