"""Readings are the softmax of the logits, however the vocabulary is cut."""

import numpy as np
import pytest

from gptoss.sight import lens
from gptoss.sight.lens import Lens, read_logits


def cut(logits, width):
    return [(i, logits[:, i : i + width]) for i in range(0, logits.shape[1], width)]


@pytest.mark.parametrize("width", [3, 17, 100, 1000])
def test_a_reading_is_a_softmax_whatever_the_slices(width):
    rng = np.random.default_rng(1)
    logits, came = 4 * rng.standard_normal((9, 100)), rng.integers(0, 100, 9)
    came[4] = -1
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    truth = logits[range(9), came] - 1e-9  # computed elsewhere, and rounded otherwise
    found = read_logits(cut(logits, width), came, truth, 5)
    order = np.argsort(-logits, axis=1)
    assert (found.likeliest == order[:, :5]).all()
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(logprobs, order[:, :5], axis=1))
    there = came >= 0
    np.testing.assert_allclose(found.came[there], logprobs[there, came[there]])
    assert np.isnan(found.came[4]) and found.rank[4] == 0
    assert (found.rank[there] == 1 + (order == came[:, None]).argmax(axis=1)[there]).all()


def test_at_the_last_layer_the_lens_shows_the_models_own_logits(nano, probabilities, monkeypatch):
    monkeypatch.setattr(lens, "ROWS", 50)  # in parts of both kinds
    monkeypatch.setattr(lens, "SLICE", 300)
    last = nano.traced[f"block.{nano.config.num_hidden_layers - 1}"]
    came = np.array([*nano.tokens[1:], -1])
    found = Lens(nano.config, nano.weights).read(last, came, 5)
    steps = np.arange(len(came) - 1)
    np.testing.assert_allclose(
        np.exp(found.logprobs),
        np.take_along_axis(probabilities, found.likeliest, axis=1),
        atol=1e-5,
    )
    assert (found.likeliest[:, 0] == probabilities.argmax(axis=1)).all()
    np.testing.assert_allclose(np.exp(found.came[:-1]), probabilities[steps, came[:-1]], atol=5e-5)


def test_a_layer_below_shows_its_own_residual(nano):
    x = nano.traced["block.1"].astype(np.float64)
    w = nano.backend.weights
    normed = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5) * w.norm
    logits = normed @ w.unembedding.T
    assert (nano.sight.lens[1].likeliest[:, 0] == logits.argmax(axis=1)).all()
