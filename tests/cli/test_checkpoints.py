"""inspect, convert, synthesize and models."""

import json

import numpy as np
import pytest

from gptoss.checkpoint.open import open_checkpoint
from tests.cli.conftest import run, start


def test_inspect_shows_config_layout_and_every_tensor(gptoss_, toy):
    status, out, _ = gptoss_("inspect", toy)
    checkpoint = open_checkpoint(toy)
    assert status == 0 and all(name in out for name in checkpoint.tensors)
    assert "num_experts" in out and "huggingface" in out
    facts = json.loads(gptoss_("inspect", toy, "--json", "--check")[1])
    assert facts["finite"] and facts["config"]["hidden_size"] == 64
    assert sum(t["bytes"] for t in facts["tensors"]) < facts["bytes"] == checkpoint.nbytes


def test_inspect_survives_a_reader_that_leaves(toy):
    with start("inspect", toy) as process:
        process.stdout.close()
        assert process.wait(60) == 141 and process.stderr.read() == b""


@pytest.mark.parametrize("layout", ["original", "huggingface", "huggingface-bf16"])
def test_convert_writes_the_same_weights_in_another_layout(gptoss_, toy, tmp_path, layout):
    status, out, err = gptoss_("convert", toy, tmp_path / "new", "--to", layout)
    assert (status, out) == (0, "") and layout in err
    old, new = open_checkpoint(toy), open_checkpoint(tmp_path / "new")
    assert new.layout.name == layout and new.config == old.config
    name = "block.1.mlp.mlp1_weight"
    np.testing.assert_array_equal(new.dense(name), old.dense(name))
    answers = [
        gptoss_("generate", path, "-q", "--raw", "-p", "a", "--seed", "1", "-l", "9")[1]
        for path in (toy, tmp_path / "new")
    ]
    assert answers[0] == answers[1]


def test_convert_leaves_nothing_half_written(gptoss_, toy, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for source, target in ((toy, tmp_path / "taken"), (tmp_path / "none", tmp_path / "new")):
        status, _, err = gptoss_("convert", source, target, "--to", "original")
        assert status == 1 and err.startswith("gptoss: ") and len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_an_unknown_layout_is_a_wrong_command_line(gptoss_, toy, tmp_path):
    status, _, err = gptoss_("convert", toy, tmp_path / "new", "--to", "zip")
    assert status == 2 and "zip" in err


def test_convert_writes_a_gguf(gptoss_, toy, tmp_path):
    sizes = []
    for words in ((), ("--dense", "bf16"), ("--dense", "q8_0")):
        target = tmp_path / f"{len(sizes)}.gguf"
        status, out, err = gptoss_("convert", toy, target, "--to", "gguf", *words)
        assert (status, out) == (0, "") and "gguf" in err
        assert target.read_bytes().startswith(b"GGUF")
        sizes.append(target.stat().st_size)
    assert sizes[0] == sizes[1] > sizes[2]
    for words in (("--to", "gguf"), ("--to", "original", "--dense", "bf16")):
        status, _, err = gptoss_("convert", toy, tmp_path / "new", *words)
        assert status == 2 and len(err.splitlines()) == 1


def test_synthesize_makes_a_checkpoint_that_runs(gptoss_, toy, tmp_path):
    words = f"{toy}/tokenizer.json"
    make = ("synthesize", "nano", tmp_path / "s", "--layers", 1, "--seed", 3, "--tokenizer", words)
    assert gptoss_(*make)[0] == 0
    facts = json.loads(gptoss_("inspect", tmp_path / "s", "--json")[1])
    assert facts["config"]["num_hidden_layers"] == 1
    assert gptoss_("generate", tmp_path / "s", "-p", "hi", "-l", "3", "-q")[0] == 0
    assert gptoss_(*make)[0] == 1, "it is there already"


def test_models_lists_what_there_is(gptoss_, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").symlink_to(toy)
    status, out, _ = gptoss_("models")
    assert status == 0 and "openai/gpt-oss-20b: 20.9 B parameters" in out
    assert "checkpoints/mine: huggingface layout" in out
    facts = json.loads(gptoss_("models", "--json")[1])
    assert [round(row["bytes"] / 1e9, 1) for row in facts["published"]] == [13.8, 65.2]


def test_version_and_help_need_no_heavy_module():
    import subprocess
    import sys

    from tests.cli.conftest import ENVIRONMENT

    code = (
        "import sys\nfrom gptoss.cli.main import main\n"
        "sys.argv = ['gptoss', 'generate', '--help']\n"
        "try:\n  main()\nexcept SystemExit as end:\n  assert not end.code\n"
        "heavy = {'numpy', 'torch', 'rich', 'typer', 'tiktoken', 'huggingface_hub'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, capture_output=True)
    assert run("--version")[1].startswith("gptoss 0.")
    assert run()[0] == 2
    assert run("nonsense")[0] == 2
