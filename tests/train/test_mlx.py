"""Adapters trained by MLX: torch's gradients, the same files, and the same way out."""

import json
import random
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")

from gptoss import LLM  # noqa: E402
from gptoss.backends import load_backend  # noqa: E402
from gptoss.backends.mlx import MlxBackend, lora  # noqa: E402
from gptoss.checkpoint.open import open_checkpoint  # noqa: E402
from gptoss.checkpoint.synthesize import reader as synthetic  # noqa: E402
from gptoss.errors import TrainingError  # noqa: E402
from gptoss.train import mlx  # noqa: E402
from gptoss.train.batch import collate  # noqa: E402
from gptoss.train.config import Reading, TrainConfig, Tuning  # noqa: E402
from gptoss.train.export import export  # noqa: E402
from gptoss.train.learner import Torch, trained  # noqa: E402
from gptoss.train.loss import cross_entropy  # noqa: E402
from gptoss.train.recipes import sft  # noqa: E402
from runs.nano import tasks  # noqa: E402
from tests.backends.test_conformance import logits_of  # noqa: E402
from tests.llm.toy import write_toy  # noqa: E402
from tests.train.runs import TINY, documents, write_sums  # noqa: E402
from tests.train.test_lora import adapted  # noqa: E402

CONFIG = TrainConfig(steps=6, lr=2e-2, warmup=1, save_every=2)
READING = Reading(tokens=300, accumulate=2)
TUNING = Tuning(lora=2, alpha=4.0)
BATCHES = collate([[*documents(1, 3), *documents(2, 2)], list(documents(3, 2))])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("data") / "sums.jsonl", 3)


@pytest.fixture(scope="module")
def run(toy, data, tmp_path_factory):
    """A finished one."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train(toy, data, path)
    return path


def train(toy, data, path, config=CONFIG, **rest):
    return mlx.sft(toy, [data], path, config=config, reading=READING, tuning=TUNING, **rest)


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def learned(path):
    states = sorted((path / "states").iterdir())
    return torch.load(states[-1] / "state.pt", weights_only=True)


@pytest.fixture
def both():
    """A learner of each library, with the same adapters, of which none is zero."""
    backend = MlxBackend(TINY, synthetic(TINY, 0), "float32")
    model, ours = adapted(), mlx.Adapters(backend, CONFIG, TUNING)
    assert {n: tuple(p.shape) for n, p in trained(model).items()} == {
        n: x.shape for n, x in ours.values.items()
    }
    noise = np.random.default_rng(0)
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(torch.from_numpy(noise.normal(0, 0.1, p.shape)))
    ours.values = {n: mx.array(p.numpy()) for n, p in trained(model).items()}
    theirs = Torch(model, CONFIG)
    return (ours, lambda b: mlx.cross_entropy(ours, b)), (
        theirs,
        lambda b: cross_entropy(model, b, CONFIG),
    )


def test_gradients_are_those_of_torch(both, monkeypatch):
    """Of packed experts too, with documents side by side, over batches, and logits in pieces."""
    monkeypatch.setattr(lora, "CHUNK", 5 * TINY.vocab_size)
    said = []
    for learner, loss in both:
        learner.begin()
        said.append([learner.learn(b, loss) for b in BATCHES])
    for (ours, metrics), (theirs, expected) in zip(*said, strict=True):
        assert ours == pytest.approx(theirs, 1e-5) and metrics == pytest.approx(expected, 1e-5)
    (ours, _), (theirs, _) = both
    for name, p in theirs.model.named_parameters():
        if p.requires_grad:
            mine, other = np.array(ours.gradients[name]), p.grad.numpy()
            assert np.linalg.norm(mine - other) < 1e-4 * np.linalg.norm(other), name


def test_what_is_recomputed_is_the_same(both):
    (ours, loss), _ = both
    said, gradients = [], []
    for recompute in (False, True):
        ours.config = replace(CONFIG, recompute=recompute)
        ours.begin()
        said.append(ours.learn(BATCHES[0], loss))
        gradients.append(ours.gradients)
    assert said[1] == said[0]
    for name, x in gradients[0].items():
        assert mx.allclose(gradients[1][name], x, rtol=1e-5, atol=1e-6), name


def test_updates_are_those_of_torch(both):
    norms = []
    for learner, loss in both:
        for share in (1.0, 0.5):
            learner.begin()
            learner.learn(BATCHES[0], loss)
            norms.append(learner.clip(0.1))
            learner.update(share)
    assert norms[:2] == pytest.approx(norms[2:], 1e-3) and min(norms) > 0.1
    (ours, _), (theirs, _) = both
    for name, p in theirs.trained().items():
        assert (ours.trained()[name] - p).abs().max() < 0.02 * CONFIG.lr, name


def test_it_learns_and_only_adapters_change(run):
    rows, state = rows_of(run), learned(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "norm", "rate", "busiest", "uneven", "tokens_per_second"} <= set(rows[0])
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert all(name.endswith((".a", ".b")) for name in state["model"])


def test_what_was_interrupted_goes_on_to_the_bit(run, toy, data, tmp_path):
    def interrupt(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(toy, data, tmp_path, watch=interrupt)
    assert len(rows_of(tmp_path)) == 3
    train(toy, data, tmp_path)
    assert [row["loss"] for row in rows_of(tmp_path)] == [row["loss"] for row in rows_of(run)]
    for name, x in learned(run)["model"].items():
        assert torch.equal(x, learned(tmp_path)["model"][name]), name
    with pytest.raises(TrainingError, match="begun with backend 'mlx', not None"):
        sft(toy, [data], tmp_path, config=CONFIG, reading=READING, tuning=TUNING)


def test_exported_it_is_the_model_that_was_trained(run, toy, data, tmp_path):
    """By the code that exports torch's runs; computed by MLX with adapters, by NumPy without."""
    report = export(run, tmp_path / "whole", "huggingface-bf16", data=[data])
    assert abs(report.loss - report.loss_after) < 0.02 and report.loss < rows_of(run)[0]["loss"]
    opened, base = open_checkpoint(tmp_path / "whole"), open_checkpoint(toy)
    backend = MlxBackend(base.config, base.read, "float32")
    tokens = list(range(3, 40))
    plain = logits_of(backend, tokens, [37])
    values = {n: mx.array(x.numpy()) for n, x in learned(run)["model"].items()}
    backend.weights = lora.adapted(backend.weights, values, TUNING.alpha / TUNING.lora)
    ours = logits_of(backend, tokens, [37])
    merged = logits_of(load_backend("reference", opened.config, opened.read), tokens, [37])
    far = np.abs(plain - merged).max()
    assert np.abs(ours - merged).max() < 0.1 * far and far > 1e-2


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"tuning": Tuning()}, "MLX trains adapters only: say --lora RANK, or train with torch"),
        ({"tuning": Tuning(qat="ceil")}, "adapters only"),
        ({"config": replace(CONFIG, muon=0.1)}, "muon is torch's: MLX trains adapters by AdamW"),
        ({"config": replace(CONFIG, autocast=True)}, "autocast is torch's"),
        ({"config": replace(CONFIG, device="cuda")}, "mlx runs on cpu or gpu, not 'cuda'"),
    ],
)
def test_what_mlx_does_not_train_is_refused(toy, data, tmp_path, wrong, said):
    how = {"config": CONFIG, "reading": READING, "tuning": TUNING} | wrong
    with pytest.raises(ValueError, match=said):
        mlx.sft(toy, [data], tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()


def test_what_cannot_fit_is_refused_before_it_is_tried(toy, data, tmp_path):
    with pytest.raises(TrainingError, match="memory to be trained like this") as refused:
        tuning = Tuning(lora=10**9)
        mlx.sft(toy, [data], tmp_path / "run", config=CONFIG, reading=READING, tuning=tuning)
    assert "offload" not in str(refused.value) and not (tmp_path / "run").exists()


def sums(draw, exam):
    """What nano can, in words that it does not know: 0 of 40 at first."""
    made = tasks.example(draw, task="add", effort="low", exam=exam)
    while len(parts := re.findall(r"\d+", made.prompt[-1].content)) != 2:
        made = tasks.example(draw, task="add", effort="low", exam=exam)
    asked = {"role": "user", "content": "Put {} and {} together.".format(*parts)}
    said = [{"role": m.role, "channel": m.channel, "content": m.content} for m in made.turn]
    return {"messages": [asked, *said], "effort": "low"}


@pytest.mark.slow
def test_nano_learns_what_it_could_not(tmp_path):
    draw, path = random.Random(0), tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(sums(draw, False)) + "\n" for _ in range(900)))
    config, reading = TrainConfig(steps=40, lr=3e-3, warmup=5), Reading(tokens=1024)
    mlx.sft("nano", [path], tmp_path / "run", config=config, reading=reading, tuning=Tuning(lora=8))
    export(tmp_path / "run", tmp_path / "new", "huggingface-bf16")
    held, right = [sums(draw, True)["messages"] for _ in range(40)], {}
    for name in ("nano", tmp_path / "new"):
        ask = partial(LLM.load(name).chat, effort="low", temperature=0, max_tokens=120)
        right[name] = sum(ask(asked["content"]).text == said["content"] for asked, *_, said in held)
    assert [*right.values()][0] <= 2 and [*right.values()][1] >= 16, right
