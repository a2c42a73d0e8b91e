"""Whole recipes on a toy, into checkpoints that other programs and our backends load."""

import pytest

torch = pytest.importorskip("torch")

import json  # noqa: E402
import shutil  # noqa: E402
from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402

from gptoss.backends import load_backend  # noqa: E402
from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.checkpoint.open import open_checkpoint  # noqa: E402
from gptoss.errors import BackendUnavailable, CheckpointError, TrainingError  # noqa: E402
from gptoss.train.config import Reading, TrainConfig, Tuning  # noqa: E402
from gptoss.train.export import export, reader  # noqa: E402
from gptoss.train.recipes import load_run, pretrain, sft  # noqa: E402
from tests.backends.test_conformance import logits_of  # noqa: E402
from tests.llm.toy import CONFIG as NUMBERS  # noqa: E402
from tests.llm.toy import toy_tokenizer, write_toy  # noqa: E402
from tests.train.runs import write_sums  # noqa: E402

CONFIG = TrainConfig(steps=5, lr=1e-2, warmup=1, threads=1, save_every=2)
READING = Reading(tokens=700, accumulate=2)
CASES = {
    "all": Tuning(),
    "lora": Tuning(lora=4),
    "qat": Tuning(qat="ceil"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("data") / "sums.jsonl", 4)


@pytest.fixture(scope="module")
def runs(toy, data, tmp_path_factory):
    """Finished ones."""
    path = tmp_path_factory.mktemp("runs")
    for name, tuning in CASES.items():
        sft(toy, [data], path / name, config=CONFIG, reading=READING, tuning=tuning)
    return path


@pytest.fixture(params=CASES)
def run(request, runs):
    """One of them."""
    return runs / request.param


@pytest.fixture
def whole(runs):
    """The one that trained everything."""
    return runs / "all"


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(run):
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_it_goes_on_to_the_bit(run, toy, data, tmp_path):
    """Stopped in the middle by whoever watches."""

    def stop(row):
        if row["step"] == 3:
            raise RuntimeError("stopped")

    arguments = (toy, [data], tmp_path / "run")
    how = {"config": CONFIG, "reading": READING, "tuning": CASES[run.name]}
    with pytest.raises(RuntimeError, match="stopped"):
        sft(*arguments, **how, watch=stop)
    sft(*arguments, **how)
    assert [r["loss"] for r in rows_of(tmp_path / "run")] == [r["loss"] for r in rows_of(run)]


@pytest.mark.parametrize("layout", ["original", "huggingface", "huggingface-bf16"])
def test_exported_it_is_the_model_that_was_trained(run, data, tmp_path, layout):
    """As far as the layout's precision allows; what it cannot hold is reported."""
    report = export(run, tmp_path / layout, layout, data=[data])
    checkpoint = open_checkpoint(tmp_path / layout)
    assert checkpoint.layout.name == layout
    worst = max(row["relative"] for row in report.experts)
    assert len(report.experts) == 2 * NUMBERS.num_hidden_layers * NUMBERS.num_experts
    if layout == "huggingface-bf16":
        assert 0 < worst < 5e-3
        assert abs(report.loss_after - report.loss) < 0.05 * report.loss
    else:
        assert 5e-3 < worst < 0.3
    if run.name == "qat" and layout != "huggingface-bf16":  # trained to be packed
        assert abs(report.loss_after - report.loss) < 0.01 * report.loss
    written = json.loads((run / f"export-{layout}.json").read_text())
    assert written["loss_after"] == report.loss_after
    assert f"loss {report.loss:.4f} as trained" in str(report)


@pytest.mark.parametrize("layout", ["huggingface", "huggingface-bf16"])
def test_exported_it_loads_in_transformers_and_in_the_native_backend(whole, tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    export(whole, tmp_path / "out", layout)
    tokens = list(range(40))
    unpack = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        attn_implementation="eager",
        **(unpack if layout == "huggingface" else {}),
    ).float()
    wanted = theirs(torch.tensor([tokens])).logits[0].detach().numpy()
    checkpoint = open_checkpoint(tmp_path / "out")
    trained = Transformer.from_checkpoint(tmp_path / "out", dtype="float32")
    found = {"torch": trained(torch.tensor(tokens)).detach().numpy()}
    try:
        backend = load_backend("native", checkpoint.config, checkpoint.read)
    except BackendUnavailable:
        pass
    else:
        found["native"] = logits_of(backend, tokens, [len(tokens)])
    for name, logits in found.items():
        assert np.abs(logits - wanted).max() < 0.02 * np.abs(wanted).max(), name


def test_the_run_can_be_opened_in_python(whole):
    model, asked = load_run(whole)
    assert asked["recipe"] == "sft" and asked["lr"] == CONFIG.lr
    assert reader(model)("norm.scale").shape == (NUMBERS.hidden_size,)


def test_pretraining_begins_with_nothing(data, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NUMBERS.to_json()))
    toy_tokenizer().save(tmp_path / "words.json")
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "abcabcabcabcabcabcabc"}\n' * 20)
    config = replace(CONFIG, muon=1e-2, balance=0.01, steps=8)
    arguments = (tmp_path / "config.json", [text, data], tmp_path / "run")
    pretrain(*arguments, tokenizer=tmp_path / "words.json", config=config, reading=READING)
    rows = rows_of(tmp_path / "run")
    assert abs(rows[0]["cross_entropy"] - np.log(NUMBERS.vocab_size)) < 0.5
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 0.5
    export(tmp_path / "run", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tokenizer_path is not None


def test_bad_data_cost_nothing(toy, data, tmp_path):
    """Neither before training nor when a file changes under it."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text() + "{}\n")
    with pytest.raises(TrainingError, match="bad.jsonl line 17: messages: expected a list"):
        sft(toy, [bad], tmp_path / "run", config=CONFIG, reading=READING)
    assert not (tmp_path / "run").exists()
    bad.write_text(data.read_text())

    def spoil(row):
        if row["step"] == 3:
            bad.write_text("x" * len(data.read_text()))

    with pytest.raises(TrainingError, match="bad.jsonl line .*: not valid JSON"):
        sft(toy, [bad], tmp_path / "run", config=CONFIG, reading=READING, watch=spoil)
    assert (tmp_path / "run" / "states" / "00000003").is_dir()


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({}, TrainingError, r"this run was begun with lr 0\.01, not 0\.5"),
        ({"model": "nowhere"}, CheckpointError, "nowhere: no such file"),
        ({"reading": Reading(tokens=100)}, TrainingError, "line 1: .* more than the 100"),
        ({"reading": Reading(train_on="tool")}, TrainingError, "no message is of tool"),
        ({"config": replace(CONFIG, device="cuda:99")}, BackendUnavailable, "sees . CUDA devices"),
        ({"config": replace(CONFIG, device="abacus")}, ValueError, "not 'abacus'"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(toy, data, whole, tmp_path, change, error, said):
    path = tmp_path / "run" if change else whole
    how = {"reading": READING, "config": replace(CONFIG, lr=0.5)}
    with pytest.raises(error, match=said):
        sft(**{"model": toy, "data": [data], **how, **change}, path=path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda asked: {}, "does not say recipe, model, tokenizer, lora, alpha, qat, dtype"),
        (lambda asked: {k: v for k, v in asked.items() if k != "model"}, "does not say model, "),
        (lambda asked: [asked], "expected a JSON object"),
    ],
)
def test_a_run_whose_config_is_not_its_own_is_one_sentence(whole, tmp_path, change, said):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(TrainingError, match=f"config.json: {said}"):
        export(tmp_path / "run", tmp_path / "out")


def test_a_run_is_no_model_until_it_is_exported(whole, data, tmp_path):
    with pytest.raises(TrainingError, match="export it first"):
        sft(whole, [data], tmp_path / "run", config=CONFIG)
    with pytest.raises(TrainingError, match="there is no run"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: TrainConfig(steps=0), "steps must be at least 1"),
        (lambda: TrainConfig(lr=float("nan")), "lr must be at least 0"),
        (lambda: TrainConfig(beta1=1.0), "beta1 must be at least 0 and at most 0.9999"),
        (lambda: Reading(train_on="assistant,cat"), "'cat' is no role"),
        (lambda: Reading(train_on="assistant/loud"), "'assistant/loud' is no role"),
        (lambda: Tuning(lora=2, qat="floor"), "exclude each other"),
    ],
)
def test_a_config_cannot_exist_wrong(make, said):
    with pytest.raises(ValueError, match=said):
        make()
