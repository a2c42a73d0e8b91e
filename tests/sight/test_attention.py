"""The weights are those with which the reference mixes values."""

import numpy as np
import pytest

from gptoss.model.reference import attend_row
from gptoss.model.weights import Attention
from gptoss.sight.attention import attention_weights, strongest, threshold


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("new", [1, 7, 20])
def test_weights_times_values_are_what_attention_gives(window, new):
    rng = np.random.default_rng(new)
    n, H, K, d = 20, 6, 2, 8
    q, sinks = rng.standard_normal((new, H, d)), rng.standard_normal(H)
    k, v = rng.standard_normal((2, n, K, d))
    weights = attention_weights(q, k, sinks, window)
    assert weights.shape == (new, H, n + 1)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-12)
    mixed = np.einsum("thn,nhd->thd", weights[..., :-1], np.repeat(v, H // K, axis=1))
    np.testing.assert_allclose(mixed, attend_row(q, k, v, sinks, window), rtol=1e-9, atol=1e-12)


def test_they_are_those_of_a_whole_model(nano):
    for i in range(nano.config.num_hidden_layers):
        q, k, v = (nano.traced[f"block.{i}.attn.{name}"] for name in "qkv")
        w: Attention = nano.backend.weights.block[i].attn
        weights = attention_weights(q, k, w.sinks, nano.config.window(i))
        mixed = np.einsum("thn,nhd->thd", weights[..., :-1], np.repeat(v, 2, axis=1))
        np.testing.assert_allclose(mixed, nano.traced[f"block.{i}.attn.mixed"], atol=1e-5)


def test_the_strongest_come_first_and_what_is_not_there_weighs_nothing():
    weights = np.array([[0.1, 0.5, 0.2, 0.15], [0.0, 0.0, 1.0, 0.0]])
    best, where = strongest(weights, 2)
    assert best.tolist() == [[0.5, 0.2], [1.0, 0.0]] and where[:, 0].tolist() == [1, 2]
    best, _ = strongest(weights, 6)
    assert best.shape == (2, 6) and (best[:, 4:] == 0).all()
    np.testing.assert_allclose(best.sum(axis=1), weights.sum(axis=1))


@pytest.mark.parametrize("most", [0, 1, 10, 99, 100, 1000])
def test_a_threshold_keeps_no_more_than_asked(most):
    weights = np.random.default_rng(0).random(100).astype(np.float32)
    kept = weights >= threshold(weights, most)
    assert kept.sum() == min(most, (weights >= 1 / 255).sum())
    assert not kept.any() or weights[kept].min() > weights[~kept].max(initial=0.0)
