"""Adapters by MLX from the command line: to a directory that mlx-lm reads, and what is refused."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("mlx.core")

import json

HOW = ("-b", "mlx", "--steps", "2", "--tokens", "300", "--warmup", "0", "--lr", "1e-2")
LORA = ("--lora", "2")


@pytest.fixture
def words(toy, tmp_path):
    """A command that trains, up to its options."""
    path = tmp_path / "sums.jsonl"
    turn = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    path.write_text(json.dumps({"messages": turn}) + "\n")
    return ("train", "sft", toy, path, "--out", tmp_path / "run", *HOW)


def test_from_data_to_a_directory_of_mlx_lm(gptoss_, words, tmp_path):
    status, _, err = gptoss_(*words, *LORA)
    assert status == 0 and "gptoss train export" in err
    status, out, _ = gptoss_("train", "export", tmp_path / "run", tmp_path / "new", "--to", "mlx")
    assert status == 0 and "experts are" in out
    status, out, _ = gptoss_("inspect", tmp_path / "new")
    assert status == 0 and "mlx" in out
    status, _, err = gptoss_(*words[:-2], "--lr", "1e-3", *LORA)
    assert status == 1 and "this run was begun with lr 0.01, not 0.001" in err


@pytest.mark.parametrize(
    "options, said",
    [
        ((), "MLX trains adapters only: say --lora RANK, or train with torch"),
        ((*LORA, "--qat", "ceil"), "lora and qat exclude each other"),
        ((*LORA, "--muon", "0.1"), "muon is torch's: MLX trains adapters by AdamW alone"),
        ((*LORA, "--trace", "steps"), "--trace is torch's"),
        ((*LORA, "--device", "cuda"), "mlx runs on cpu or gpu, not 'cuda'"),
    ],
)
def test_what_mlx_does_not_train_is_said_in_a_sentence(gptoss_, words, tmp_path, options, said):
    status, _, err = gptoss_(*words, *options)
    assert status == 2 and said in err and not (tmp_path / "run").exists()


def test_it_trains_in_one_process(gptoss_, words, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    status, _, err = gptoss_(*words, *LORA)
    assert status == 2 and "torchrun is torch's" in err and not (tmp_path / "run").exists()
