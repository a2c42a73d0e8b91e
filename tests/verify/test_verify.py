"""Right backends are right at every trace point; what is wrong in one is named, nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from gptoss.checkpoint.synthesize import reader
from gptoss.errors import BackendUnavailable
from gptoss.model.config import ModelConfig, gpt_oss_20b
from gptoss.model.weights import random_weights, specs
from gptoss.verify.candidate import Candidate
from gptoss.verify.layers import regret
from gptoss.verify.mutants import planted
from gptoss.verify.precision import precision_of, scaled
from gptoss.verify.verify import LAST, texts, verify
from tests.conftest import TINY
from tests.verify.conftest import REST

WIDE = ModelConfig(  # wide enough for 8 bits
    num_hidden_layers=2,
    hidden_size=544,
    vocab_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=6,
    experts_per_token=3,
    intermediate_size=96,
)
LONG = replace(TINY, num_hidden_layers=2, sliding_window=128)
ALL = [
    ("reference", {}),
    ("native", {"precision": "exact"}),
    ("native", {"precision": "fast"}),
    ("native", {"precision": "fast", "kv": "int8"}),
    ("torch", {"dtype": "float32"}),
    ("torch", {"dtype": "bfloat16"}),
]


def findings(candidate, lengths, **how):
    found = []
    try:
        verify(candidate, texts(candidate.config.vocab_size, lengths), found.append, **how)
    except BackendUnavailable as missing:
        pytest.skip(str(missing))
    return found


def wrong(found, mode="isolated"):
    return [f.point for f in found if not f.ok and f.mode == mode]


@pytest.mark.parametrize(
    "name, how", [*ALL, *(pytest.param(*one, marks=pytest.mark.slow) for one in REST)]
)
def test_a_right_backend_is_right_everywhere(name, how):
    found = findings(Candidate(WIDE, reader(WIDE, 4), name, how), [16, 140])
    assert all(f.ok for f in found), "\n".join(str(f) for f in found if not f.ok)
    layers = 13 * WIDE.num_hidden_layers  # trace points of each
    assert [f.mode for f in found].count("isolated") == layers + 2  # the last norm, logits
    assert [f.mode for f in found].count("propagated") == layers + 3  # and the embedding
    assert [f.mode for f in found][-1] == "stepwise"


@pytest.mark.slow
@pytest.mark.parametrize("name, how", [ALL[1], ALL[4]])
def test_past_the_window_and_past_4096_tokens(name, how):
    weights = random_weights(LONG)
    found = findings(Candidate(LONG, weights.__getitem__, name, how), [130, 4200])
    assert all(f.ok for f in found), "\n".join(str(f) for f in found if not f.ok)


def test_another_backend_may_judge():
    judge = Candidate(WIDE, reader(WIDE, 4), "reference", {})
    for dtype in ("float32", "bfloat16"):
        candidate = Candidate(WIDE, reader(WIDE, 4), "torch", {"dtype": dtype})
        found = findings(candidate, [16, 140], against=judge)
        assert all(f.ok for f in found), "\n".join(str(f) for f in found if not f.ok)


torch_ops = pytest.importorskip("gptoss.backends.torch.ops")
torch_cache = pytest.importorskip("gptoss.backends.torch.cache")
RIGHT = {name: getattr(torch_ops.TorchOps, name) for name in ("linear", "rope", "route", "experts")}
ATTEND = torch_cache.TorchView.attend


def without_bias(self, x, weight, bias):
    return RIGHT["linear"](self, x, weight, bias if len(weight) != WIDE.qkv_size else None)


def turned_by_one(self, x, positions, config):
    return RIGHT["rope"](self, x, positions + (x.shape[1] == 2), config)


def softmax_first(self, scores, k):
    chosen, _ = RIGHT["route"](self, scores, k)
    return chosen, scores.float().softmax(-1).gather(-1, chosen).to(scores.dtype)


def second_best(self, scores, k):
    chosen, share = RIGHT["route"](self, scores, k + 1)
    return chosen[:, 1:], share[:, 1:] / share[:, 1:].sum(-1, keepdim=True)


def narrower_clamp(self, x, w, chosen, share, config):
    return RIGHT["experts"](self, x, w, chosen, share, replace(config, swiglu_limit=1.0))


def one_key_more(self, layer, q, k, v, sinks, window):
    return ATTEND(self, layer, q, k, v, sinks, window and window + 1)


def no_sink(self, layer, q, k, v, sinks, window):
    return ATTEND(self, layer, q, k, v, sinks - 100.0, window)


BUGS = {
    "linear": (without_bias, ["attn.q"]),
    "rope": (turned_by_one, ["attn.k", "attn.mixed"]),
    "route": (softmax_first, ["mlp.share"]),
    "route ": (second_best, ["mlp.chosen"]),
    "experts": (narrower_clamp, ["mlp.out"]),
    "attend": (one_key_more, ["attn.mixed"]),
    "attend ": (no_sink, ["attn.mixed"]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", BUGS)
def test_what_is_wrong_is_named(monkeypatch, what, dtype):
    bug, first = BUGS[what]
    owner = torch_cache.TorchView if what.strip() == "attend" else torch_ops.TorchOps
    monkeypatch.setattr(owner, what.strip(), bug)
    found = findings(Candidate(WIDE, reader(WIDE, 4), "torch", {"dtype": dtype}), [140, 300])
    told = wrong(found)
    sharp = dtype == "float32" or bug not in (one_key_more, narrower_clamp)
    if not sharp and not told:
        pytest.xfail("smaller than bfloat16's own rounding on these weights")
    assert told[0] == f"block.0.{first[0]}"
    if bug is one_key_more:  # an odd layer has no window, and is not accused
        assert not any(point.startswith("block.1.") for point in told)
    assert wrong(found, "propagated")[0] == told[0]


def test_what_goes_wrong_only_when_tokens_come_one_by_one():
    candidate = Candidate(WIDE, reader(WIDE, 4), "reference", {})
    with planted("positions restart in each chunk"):
        found = findings(candidate, [16, 40])
    assert [f.mode for f in found if not f.ok] == ["stepwise"]
    assert found[-1].token >= min(16, 40) - LAST


def test_near_ties_are_no_alarm_and_hide_nothing(monkeypatch):
    """Router rows in pairs so near that bfloat16 often takes the one for the other."""
    read = reader(WIDE, 4)
    weights = {spec.name: read(spec.name) for spec in specs(WIDE)}
    for name in [name for name in weights if ".gate." in name]:
        x = weights[name].astype(np.float32)
        x[1::2] = x[::2] * np.float32(1.001)
        weights[name] = x
    candidate = Candidate(WIDE, weights.__getitem__, "torch", {"dtype": "bfloat16"})
    found = findings(candidate, [140, 300])
    assert all(f.ok for f in found), "\n".join(str(f) for f in found if not f.ok)
    table = weights["embedding.weight"].astype(np.float64)
    starts, tokens = np.array([0, 300]), np.concatenate(texts(WIDE.vocab_size, [300]))
    exact = replace_backend(candidate, "reference").layer(0, table[tokens], starts)
    ours = candidate.layer(0, table[tokens], starts)
    chosen = "block.0.mlp.chosen"
    assert (ours[chosen] != exact[chosen]).any(axis=-1).mean() > 0.2, "no tie was turned over"

    def coarse(self, x, w, chosen, share, config):
        return RIGHT["experts"](self, x, w, chosen, share, config) * 1.2

    monkeypatch.setattr(torch_ops.TorchOps, "experts", coarse)
    assert wrong(findings(candidate, [140, 300]))[0] == "block.0.mlp.out"


def replace_backend(candidate, name):
    return Candidate(candidate.config, candidate.read, name, {})


def test_regret_is_what_a_choice_gives_away():
    scores = np.array([[1.0, 4.0, 3.0, 3.0]])
    for chosen, lost in (([1, 2], 0), ([1, 3], 0), ([2, 1], 1), ([1, 0], 2), ([1, 1], np.inf)):
        assert regret(scores, np.array([chosen])) == lost


def test_precisions_round_as_they_say():
    config = gpt_oss_20b()
    assert precision_of(config, "native", None, None, None).name == "fast"
    assert precision_of(config, "native", None, "exact", None).experts == 16
    assert precision_of(TINY, "native", None, "fast", None).experts is None
    assert precision_of(config, "torch", None, None, None).results
    assert not precision_of(config, "torch", "float32", None, None).results
    x = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    for bits in (8, 16):
        error = np.abs(scaled(x, bits) - x).max() / np.abs(x).max()
        assert 0.1 * 2.0**-bits < error <= 2.0**-bits
