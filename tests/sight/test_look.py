"""What is kept of a conversation is what the model did with it."""

import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.errors import ContextExceeded, GptOssError
from gptoss.sight.attention import attention_weights
from gptoss.sight.look import look
from tests.llm.conftest import needs_native


def test_alternatives_are_the_softmax_of_the_logits(nano, probabilities):
    seen, came = nano.sight.expected, np.array(nano.tokens[1:])
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :10]
    found = np.exp(seen.logprobs)
    np.testing.assert_allclose(found, np.take_along_axis(probabilities, best, axis=1), atol=2e-5)
    steps = np.arange(len(came))
    np.testing.assert_allclose(np.exp(seen.came[:-1]), probabilities[steps, came], atol=2e-5)
    assert np.isnan(seen.came[-1])
    assert (seen.rank[:-1] >= 1).all() and seen.rank[-1] == 0


def test_sinks_and_sources_are_the_strongest_of_each_head(nano):
    for i, layer in enumerate(nano.sight.attention):
        q, k = (nano.traced[f"block.{i}.attn.{name}"] for name in "qk")
        sinks, window = nano.backend.weights.block[i].attn.sinks, nano.config.window(i)
        weights = attention_weights(q, k, sinks, window)  # [T, H, T + 1]
        np.testing.assert_allclose(layer.sink, weights[..., -1], atol=1e-5)
        true = -np.sort(-weights[..., :-1], axis=-1)[..., : layer.weight.shape[-1]]
        clear = np.abs(true - 1 / 255) > 1e-5  # neither side of what a byte can tell
        np.testing.assert_allclose(
            layer.weight[clear], np.where(true < 1 / 255, 0, true)[clear], atol=1e-5
        )
        age = np.arange(len(q))[:, None, None] - layer.where
        assert (age[layer.weight > 0] >= 0).all()
        assert window is None or (age[layer.weight > 0] < window).all()
        at = np.take_along_axis(weights[..., :-1], layer.where, axis=-1)
        np.testing.assert_allclose(at[layer.weight > 0], layer.weight[layer.weight > 0], atol=1e-5)


def test_experts_are_those_that_the_router_chose(nano):
    for i in range(nano.config.num_hidden_layers):
        assert (nano.sight.chosen[:, i] == nano.traced[f"block.{i}.mlp.chosen"]).all()
        share = nano.traced[f"block.{i}.mlp.share"]
        np.testing.assert_allclose(nano.sight.share[:, i], share, atol=1e-5)
    np.testing.assert_allclose(nano.sight.share.sum(axis=-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("more", [-50, 0, 100])
def test_each_heads_strongest_source_is_kept_and_few_others(nano, monkeypatch, more):
    heads, layers = 4 * len(nano.tokens), nano.config.num_hidden_layers
    monkeypatch.setattr("gptoss.sight.look.WEIGHTS", layers * (heads + more))
    few = look(nano.backend, nano.weights, nano.tokens)
    for whole, layer in zip(nano.sight.attention, few.attention, strict=True):
        assert (layer.weight[..., 0] == whole.weight[..., 0]).all()
        others, all_others = layer.weight[..., 1:], whole.weight[..., 1:]
        kept = others > 0
        assert max(0, more - 5) <= kept.sum() <= max(0, more)
        assert others[kept].min(initial=1.0) >= all_others[~kept].max()


@pytest.mark.parametrize("name", [pytest.param("native", marks=needs_native), "torch", "mlx"])
def test_every_backend_shows_the_same(nano, name):
    if name != "native":
        pytest.importorskip({"mlx": "mlx.core"}.get(name, name))
    float32 = {"dtype": "float32"}
    options = {"torch": float32, "mlx": float32, "native": {"precision": "exact", "threads": 1}}
    backend = load_backend(name, nano.config, nano.weights, **options[name])
    seen = look(backend, nano.weights, nano.tokens)
    np.testing.assert_allclose(seen.expected.came, nano.sight.expected.came, atol=2e-2)
    assert (seen.chosen == nano.sight.chosen).mean() > 0.99
    for ours, reference in zip(seen.attention, nano.sight.attention, strict=True):
        np.testing.assert_allclose(ours.sink, reference.sink, atol=5e-3)
        np.testing.assert_allclose(ours.weight, reference.weight, atol=2e-2)


def test_one_token_is_a_conversation(nano):
    seen = look(nano.backend, nano.weights, nano.tokens[:1])
    assert seen.chosen.shape == (1, 4, 2)
    np.testing.assert_allclose(
        seen.attention[0].weight[..., 0] + seen.attention[0].sink, 1, atol=1e-5
    )


def test_what_cannot_be_looked_at_is_said(nano, monkeypatch):
    with pytest.raises(ValueError, match="no tokens"):
        look(nano.backend, nano.weights, [])
    with pytest.raises(ValueError, match="4000"):
        look(nano.backend, nano.weights, [4000])
    with pytest.raises(ContextExceeded, match="2048"):
        look(nano.backend, nano.weights, nano.tokens * 20)
    with monkeypatch.context() as patch, pytest.raises(ContextExceeded, match="at most 100"):
        patch.setattr("gptoss.sight.look.LONGEST", 100)
        look(nano.backend, nano.weights, nano.tokens)
    monkeypatch.setattr(nano.backend.weights, "norm", np.nan * nano.backend.weights.norm)
    with pytest.raises(GptOssError, match="NaN"):
        look(nano.backend, nano.weights, nano.tokens[:3])


def test_progress_is_told(nano):
    done = []
    look(nano.backend, nano.weights, nano.tokens, lambda *counts: done.append(counts))
    assert done == [(128, len(nano.tokens)), (len(nano.tokens),) * 2]
