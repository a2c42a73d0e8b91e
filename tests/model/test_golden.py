"""The reference against ``transformers``, at every trace point and not only at the logits.

This is the level of truth that our own backends cannot give: they all run the same ``model.py``.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptoss.backends.reference.backend import attend_row
from gptoss.model import reference
from gptoss.model.config import ModelConfig, gpt_oss_20b, nano
from gptoss.model.weights import Stored
from tests.model.cases import (
    ODD,
    SMALL,
    STORED,
    TOLERANCE,
    Case,
    Trace,
    errors,
    first_divergence,
    reference_trace,
)

LONG = replace(
    SMALL,
    num_hidden_layers=2,
    hidden_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    intermediate_size=16,
    sliding_window=128,
)
CASES = STORED | {
    "ragged": Case(config=SMALL, rows=(1, 14, 3, 33, 2), seed=3),
    "plain rope": Case(config=replace(ODD, rope_scaling_factor=1.0), rows=(25,), seed=5),
    "a window of one": Case(config=replace(SMALL, sliding_window=1), rows=(12,), seed=6),
    "one expert, equal heads": Case(
        config=replace(SMALL, num_key_value_heads=4, num_experts=1, experts_per_token=1),
        rows=(12,),
        seed=7,
    ),
    "nano": Case(config=nano(), rows=(nano().initial_context_length + 44,), seed=8),
    "long": Case(config=LONG, rows=(4200,), seed=9),  # past 4096, on a sliding and a full layer
}


@pytest.fixture(scope="module")
def oracle() -> Any:
    """``transformers``, on one core; importing it takes seconds."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.model import oracle

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield oracle
    torch.set_num_threads(before)


def assert_equal(ours: Trace, theirs: Trace, besides: str = "nothing") -> None:
    """Every trace point within the tolerance, those that end in ``besides`` left out."""
    found = {n: e for n, e in errors(ours, theirs).items() if not n.endswith(besides)}
    name = first_divergence(found)
    assert name is None, f"first diverges at {name}: {found[name]:.1e} > {TOLERANCE:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_every_trace_point_equals_transformers(oracle, name):
    case = CASES[name]
    ours = reference_trace(case.config, case.weights, case.tokens)
    theirs = oracle.transformers_trace(case.config, case.weights, case.tokens)
    assert_equal(ours, theirs)


@pytest.mark.slow  # 6 GB
def test_the_released_shapes_equal_transformers(oracle):
    """Two layers of gpt-oss-20b, in all its width; only the vocabulary is short."""
    config = replace(gpt_oss_20b(), num_hidden_layers=2, vocab_size=512)
    case = Case(config=config, rows=(160,), seed=10, packed=True)
    weights = case.weights
    for name in "mlp1_weight", "mlp2_weight":  # both layers share their matrices, to halve the room
        weights[f"block.1.mlp.{name}"] = weights[f"block.0.mlp.{name}"]
    ours = reference_trace(config, weights, case.tokens)
    assert_equal(ours, oracle.transformers_trace(config, weights, case.tokens))


TIED = Case(
    config=replace(SMALL, num_experts=7, experts_per_token=3), rows=(40,), seed=4, ties=True
)


def test_tied_experts_give_the_answer_of_transformers(oracle):
    """torch.topk leaves the order of equal scores open, so the experts behind them are equal too:
    which of a pair is chosen may differ, the answer may not."""
    ours = reference_trace(TIED.config, TIED.weights, TIED.tokens)
    theirs = oracle.transformers_trace(TIED.config, TIED.weights, TIED.tokens)
    assert_equal(ours, theirs, besides=".chosen")
    for name in ours:
        if name.endswith(".chosen"):
            assert np.array_equal(ours[name] // 2, theirs[name] // 2)  # pair by pair


def test_of_tied_experts_the_lower_comes_first_as_a_stable_topk_has_it(oracle):
    ours = reference_trace(TIED.config, TIED.weights, TIED.tokens)
    with oracle.stable_topk():
        theirs = oracle.transformers_trace(TIED.config, TIED.weights, TIED.tokens)
    assert_equal(ours, theirs)
    gate, chosen = ours["block.0.mlp.gate"], ours["block.0.mlp.chosen"]
    assert np.array_equal(gate[:, 0:6:2], gate[:, 1:6:2])  # they are ties
    assert (chosen % 2 == 1).any()
    for row in chosen.tolist():  # an odd one only after its even twin
        assert all(e % 2 == 0 or e - 1 in row[:i] for i, e in enumerate(row))


def zeroed(weights: dict[str, Stored], tail: str, value: float = 0.0) -> dict[str, Stored]:
    """The same weights, but for one value in the tensors that end in ``tail``."""
    return {n: np.full_like(x, value) if n.endswith(tail) else x for n, x in weights.items()}


def unstretched(c: ModelConfig) -> dict[str, Any]:
    """Plain rotations over a context as long: what to change in ``c``."""
    return {"rope_scaling_factor": 1.0, "initial_context_length": c.context_length}


# What must matter, or a mistake in it could not be seen.
WITHOUT = {
    "sinks": lambda c, w: (c, zeroed(w, ".sinks", -1e9)),
    "window": lambda c, w: (replace(c, sliding_window=4096), w),
    "YaRN": lambda c, w: (replace(c, **unstretched(c)), w),
    "clamp": lambda c, w: (replace(c, swiglu_limit=1e6), w),
    "epsilon": lambda c, w: (replace(c, rms_norm_eps=1e-12), w),
    "qkv bias": lambda c, w: (c, zeroed(w, "qkv.bias")),
    "out bias": lambda c, w: (c, zeroed(w, "out.bias")),
    "router bias": lambda c, w: (c, zeroed(w, "gate.bias")),
    "mlp1 bias": lambda c, w: (c, zeroed(w, "mlp1_bias")),
    "mlp2 bias": lambda c, w: (c, zeroed(w, "mlp2_bias")),
}


@pytest.mark.parametrize("what", WITHOUT)
@pytest.mark.parametrize("name", [*STORED, "nano"])
def test_the_logits_depend_on(name, what):
    case = CASES[name]
    truth = reference_trace(case.config, case.weights, case.tokens)
    config, weights = WITHOUT[what](case.config, case.weights)
    off = errors(reference_trace(config, weights, case.tokens), truth)["logits"]
    assert off > 100 * TOLERANCE, f"without {what} the logits are only {off:.1e} off"


def test_far_positions_depend_on_yarn_and_on_keys_beyond_the_window():
    """Of the long text, and on the full layer: what the last tokens see of the first."""
    case, here = CASES["long"], "block.1.attn.mixed"
    rows = case.tokens
    truth = reference_trace(case.config, case.weights, rows)[here][4096:]
    plain, near = (
        reference_trace(replace(case.config, **change), case.weights, cut)[here][-104:]
        for change, cut in ((unstretched(case.config), rows), ({}, [rows[0][-1000:]]))
    )
    for other in plain, near:
        assert np.abs(other - truth).max() > 100 * TOLERANCE * np.abs(truth).max()


@pytest.mark.parametrize("name", [*STORED, "ragged", "nano"])
def test_sinks_take_their_part_and_clamps_bite(name, monkeypatch):
    case, plain = CASES[name], reference.swiglu
    seen: list[Any] = []
    monkeypatch.setattr(reference, "swiglu", lambda x, limit: seen.append(x) or plain(x, limit))
    trace = reference_trace(case.config, case.weights, case.tokens)
    gate, up = (np.concatenate([x[:, i::2].ravel() for x in seen]) for i in (0, 1))
    limit = case.config.swiglu_limit
    for beyond in gate > limit, gate < -limit, up > limit, up < -limit:
        assert beyond.mean() > 0.005
    for layer in range(case.config.num_hidden_layers):
        q, k = (trace[f"block.{layer}.attn.{x}"][-case.rows[-1] :] for x in "qk")
        sinks = case.weights[f"block.{layer}.attn.sinks"]
        kept = attend_row(q, k, np.ones_like(k), sinks, case.config.window(layer))
        assert 0.05 < 1.0 - kept.mean() < 0.95
