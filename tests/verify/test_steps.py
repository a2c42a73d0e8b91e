"""Steps of a training, recorded: nothing changes by it, and two runs part where they differ."""

from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

from gptoss.backends.torch.ops import TorchOps
from gptoss.train.loss import cross_entropy
from gptoss.train.observe import observed
from gptoss.verify.diff import LOSS, diff
from gptoss.verify.steps import Steps
from gptoss.verify.traces import MOST, Traces, Writer
from tests.conftest import TINY
from tests.train import runs

CONFIG = replace(runs.CONFIG, steps=3, balance=0.0)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("gptoss.train.trainer.curves", lambda rows, path: None)


def recorded(folder, config=CONFIG, every=1, path=None, most=MOST, **how):
    """A run, and the file of its steps."""
    run = runs.trainer(folder, config)

    def loss(batch):
        return cross_entropy(run.model, batch, config)

    with closing(Writer(path or folder.with_suffix(".traces"), most)) as writer:
        steps = Steps(writer, every, **how)
        run.run(runs.draw, observed(run, run.model, loss, steps))
    return run.folder.rows(), Traces(writer.path), steps


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_is_kept_as_it_was_and_training_is_the_same(tmp_path, recompute):
    config = replace(CONFIG, recompute=recompute)
    plain, _ = runs.train(tmp_path / "plain", config)
    rows, traces, _ = recorded(tmp_path / "seen", config, points=["norm"], model="tiny")
    assert runs.losses(rows) == runs.losses(plain)
    assert traces.names == ["step-1", "step-1.1", "step-2", "step-2.1", "step-3", "step-3.1"]
    [first, second], _ = runs.draw(2)  # of the second step
    a, b = traces.load("step-2"), traces.load("step-2.1")
    for trace, batch in ((a, first), (b, second)):
        assert trace.tokens == batch.tokens.tolist()
        learned = trace.arrays["targets"] >= 0
        assert trace.arrays["targets"][learned].tolist() == batch.targets.tolist()
        assert np.isfinite(trace.arrays["scored"]).tolist() == learned.tolist()
        assert trace.about["lengths"] == batch.lengths and trace.about["step"] == 2
        assert trace.arrays["chosen"].shape[1:] == (TINY.num_hidden_layers, TINY.experts_per_token)
        assert trace.arrays["point/norm"].shape == (len(batch.tokens), TINY.hidden_size)
        assert trace.about["points"][-1] == "norm" and trace.about["model"] == "tiny"
    surprise = [-np.nansum(t.arrays["scored"] * t.arrays["weights"]) for t in (a, b)]
    assert sum(surprise) == pytest.approx(rows[1]["cross_entropy"], rel=1e-5)


def test_two_runs_part_where_they_differ(tmp_path, monkeypatch):
    def first_difference(one, other):
        for name in one.names:
            found = diff(one.load(name), other.load(name), 1e-5)
            if not found.same:
                return name, found
        return None

    _, one, _ = recorded(tmp_path / "one")
    _, two, _ = recorded(tmp_path / "two")
    assert first_difference(one, two) is None
    _, faster, _ = recorded(tmp_path / "faster", replace(CONFIG, lr=2e-2, muon=None))
    name, found = first_difference(one, faster)
    assert name == "step-2" and found.point == "embedding"  # the first update was another
    rope = TorchOps.rope
    monkeypatch.setattr(TorchOps, "rope", lambda self, x, at, c: rope(self, x, at + (at > 5), c))
    _, turned, _ = recorded(tmp_path / "turned")
    name, found = first_difference(one, turned)
    assert (name, found.token, found.point) == ("step-1", 6, "block.0.attn.q")


def test_what_is_learned_counts_too(tmp_path):
    _, one, _ = recorded(tmp_path / "one")
    a = one.load("step-1")
    for name, change in (("targets", 1), ("scored", 0.5), ("weights", 0.1)):
        b = replace(a, arrays=dict(a.arrays))
        b.arrays[name] = a.arrays[name].copy()
        b.arrays[name][4] += change
        found = diff(a, b)
        assert (found.token, found.point) == (4, LOSS)
    assert diff(a, a).likeliest is None


def test_what_a_training_leaves_out_is_no_difference(tmp_path):
    whole = recorded(tmp_path / "one")[1].load("step-1")
    answer = replace(whole, arrays={name: whole.arrays[name] for name in ("tokens", "sketch")})
    part = replace(whole, arrays={name: x.copy() for name, x in whole.arrays.items()})
    last = whole.about["points"].index("norm")
    part.arrays["targets"][:4], part.arrays["sketch"][:4, last] = -1, 0.0
    assert diff(part, answer).same and diff(answer, part).same
    part.arrays["sketch"][4, last] = 0.0  # after which something is learned
    found = diff(part, answer)
    assert (found.token, found.point) == (4, "norm")


def test_chosen_steps_within_a_size_and_going_on_replaces(tmp_path):
    _, traces, _ = recorded(tmp_path / "some", every=2)
    assert traces.names == ["step-1", "step-1.1", "step-3", "step-3.1"]
    path = tmp_path / "again.traces"
    recorded(tmp_path / "again", every=2, path=path)
    _, traces, _ = recorded(tmp_path / "from the start", every=2, path=path)
    assert traces.names == ["step-1", "step-1.1", "step-3", "step-3.1"]
    assert len(traces.load("step-3").tokens) == traces.size("step-3")[0]
    rows, traces, steps = recorded(tmp_path / "small", most=path.stat().st_size // 5)
    assert steps.over and len(rows) == 3 and traces.names == ["step-1"]


def test_a_minibatch_shows_its_batch_and_one_without_nothing(tmp_path):
    """As of training from rewards: what a round gave nothing to learn from has no batch."""
    run = runs.trainer(tmp_path / "run", CONFIG)
    run.close()
    [batch, _], _ = runs.draw(0)

    def loss(minibatch):
        return minibatch.batch and cross_entropy(run.model, minibatch.batch, CONFIG)

    with closing(Writer(tmp_path / "file")) as writer:
        seen = observed(run, run.model, loss, Steps(writer))
        assert seen(SimpleNamespace(batch=None)) is None
        seen(SimpleNamespace(batch=batch))
    assert Traces(tmp_path / "file").names == ["step-1"]
