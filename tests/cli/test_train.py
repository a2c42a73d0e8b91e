"""Training from the command line: what a person sees, and how it ends."""

import pytest

pytest.importorskip("torch")

import json

SUM = {
    "messages": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "channel": "analysis", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
}
HOW = ("--steps", "2", "--tokens", "300", "--warmup", "0", "--threads", "1")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(f"{json.dumps(SUM)}\n" * 3)
    return path


def test_from_data_to_an_exported_model_that_answers(gptoss_, toy, data, tmp_path):
    status, out, _ = gptoss_("train", "lint", toy, data)
    assert status == 0 and out.startswith("3 lines, 3 documents, ")
    status, _, err = gptoss_("train", "sft", toy, data, "--out", tmp_path / "run", *HOW)
    assert status == 0 and "gptoss train export" in err
    status, out, _ = gptoss_("train", "export", tmp_path / "run", tmp_path / "new", "--data", data)
    assert status == 0 and "experts are" in out and "as trained" in out
    status, out, _ = gptoss_("inspect", tmp_path / "new")
    assert status == 0 and "huggingface" in out

    data.write_text("{\n")
    words = ("train", "export", tmp_path / "run", tmp_path / "newer")
    status, _, err = gptoss_(*words, "--data", data)
    assert status == 1 and "sums.jsonl line 1: not valid JSON" in err
    (tmp_path / "run" / "config.json").write_text("{")
    status, _, err = gptoss_(*words)
    assert status == 1 and "config.json: cannot be read" in err
    assert not (tmp_path / "newer").exists()


def test_preview_marks_what_is_learned(gptoss_, toy, data):
    status, out, err = gptoss_("train", "preview", toy, data)
    assert status == 0
    assert "<|start|>assistant⟦<|channel|>analysis<|message|>two<|end|><|start|>assistant" in out
    assert "<|message|>2<|return|>⟧\n" in out and out.count("⟦") == 1
    assert "sums.jsonl line" in err and "tokens learned" in err
    _, out, _ = gptoss_("train", "preview", toy, data, "--train-on", "user")
    assert "⟦<|start|>user<|message|>1+1?<|end|>⟧" in out


def test_convert(gptoss_, tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    (tmp_path / "in.json").write_text(json.dumps([{"conversations": turns}]))
    source, target = tmp_path / "in.json", tmp_path / "out.jsonl"
    status, _, err = gptoss_("train", "convert", source, target, "--form", "sharegpt")
    assert status == 0 and "out.jsonl: 1 conversation\n" in err
    assert json.loads(target.read_text())["messages"][1]["content"] == "Ho"


@pytest.mark.parametrize(
    "words, status, said",
    [
        (("train",), 2, "RECIPE is missing"),
        (("train", "fly"), 2, "there is no recipe 'fly', only sft, pretrain"),
        (("train", "sft", "nano"), 2, "DATA is missing"),
        (("train", "sft", "nano", "x.jsonl"), 2, "--out is missing"),
        (("train", "sft", "nano", "x.jsonl", "--out", "r", "--lr", "-1"), 2, "--lr: -1 is not"),
        (
            ("train", "sft", "nano", "x.jsonl", "--out", "r", "--lora", "1", "--qat", "ceil"),
            2,
            "lora and",
        ),
        (("train", "lint", "nano", "x.jsonl"), 1, "x.jsonl: cannot be read: No such file"),
        (("train", "lint", "nano", "x.jsonl", "--train-on", "me"), 2, "'me' is no role"),
        (("train", "export", "nowhere", "x"), 1, "nowhere: there is no run"),
        (("train", "pretrain", "huge", "x.jsonl", "--out", "r"), 1, "huge: a new model is 20b"),
    ],
)
def test_what_is_wrong_is_one_sentence(gptoss_, monkeypatch, tmp_path, words, status, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = gptoss_(*words)
    assert (code, out) == (status, "") and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_bad_line_ends_in_one_sentence_and_leaves_nothing(gptoss_, toy, data, tmp_path):
    data.write_text(f"{json.dumps(SUM)}\n{{\n")
    status, out, err = gptoss_("train", "sft", toy, data, "--out", tmp_path / "run", *HOW)
    assert (status, out) == (1, "") and err.startswith("gptoss: ") and err.count("\n") == 1
    assert "sums.jsonl line 2: not valid JSON" in err
    assert not (tmp_path / "run").exists()


def test_processes_of_torchrun_are_not_traced_and_one_says_so(gptoss_, data, tmp_path, monkeypatch):
    words = ("train", "sft", "nano", data, "--out", tmp_path / "run", "--trace", tmp_path / "steps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in enumerate(["--trace is for one process alone", ""]):
        monkeypatch.setenv("RANK", str(rank))
        status, _, err = gptoss_(*words, *HOW)
        assert status != 0 and said in err and err.count("\n") == bool(said)
    assert list(tmp_path.iterdir()) == [data]


def test_help_says_what_a_recipe_takes(gptoss_):
    for name in ("sft", "pretrain", "preview", "lint", "export", "convert"):
        status, out, _ = gptoss_("train", name, "--help")
        assert status == 0 and out.startswith(f"usage: gptoss train {name} ")
    status, out, _ = gptoss_("train", "--help")
    assert status == 0 and "sft|pretrain" in out
