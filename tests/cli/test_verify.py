"""``gptoss verify`` and ``gptoss diff``: what they print, and how they end."""

import json

import numpy as np
import pytest

from gptoss.checkpoint.open import open_checkpoint
from gptoss.cli.candidates import Running
from gptoss.llm.plan import make_plan
from gptoss.verify.probes import write_probe
from gptoss.verify.trace import TraceFile


def test_a_line_for_each_point_and_a_summary(gptoss_, toy):
    status, out, _ = gptoss_("verify", toy, "-b", "reference", "--length", 12, "--length", 20)
    lines = out.splitlines()
    assert status == 0
    assert any(line.startswith("[OK] block.1.attn.q token ") for line in lines)
    assert lines[-1].startswith(f"reference in float32: {len(lines) - 1} points")
    status, out, _ = gptoss_("verify", toy, "-b", "reference", "--length", 12, "--json")
    said = json.loads(out)
    assert status == 0 and said["ok"] and said["lengths"] == [12]
    assert {point["mode"] for point in said["points"]} == {"isolated", "propagated", "stepwise"}


def test_what_is_wrong_ends_with_status_1_and_is_named(gptoss_, toy, monkeypatch):
    ops = pytest.importorskip("gptoss.backends.torch.ops").TorchOps
    route = ops.route
    monkeypatch.setattr(ops, "route", lambda *a: (route(*a)[0], route(*a)[1] * 0.9))
    status, out, _ = gptoss_("verify", toy, "-b", "torch", "--length", 20, "-q")
    assert status == 1
    assert out.startswith("[WRONG] block.0.mlp.share token ")
    assert "first block.0.mlp.share at token" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "words, why",
    [
        (["--kit", "--server", "http://127.0.0.1:9"], "--server and --kit exclude each other"),
        (["--save", "x"], "--save is for --teacher"),
        (["--length", "999999"], "the model's context"),
        (["--against", "abacus"], "unknown backend 'abacus'"),
        (["--server", "localhost"], "no address of a server"),
        (["--teacher", "a"], "the text has 1 tokens"),
        (["--memory", "1kB"], "memory (--memory) must be at least"),
        (["--server", "http://here:99999", "--served", "x"], "no address of a server"),
        (["--server", "http://127.0.0.1:9", "--served", "x", "--key", "a\nb"], "cannot be sent"),
        (["--served", "x"], "--served is for --server"),
        (["--kit", "--layers", 1], "--layers has no part in --kit"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(gptoss_, toy, words, why):
    status, _, err = gptoss_("verify", toy, *words)
    assert status == 2 and why in err


def test_experts_may_stay_on_disk(gptoss_, tmp_path):
    path = write_probe(tmp_path / "probe")
    opened = open_checkpoint(path)
    needs = make_plan(opened, backend="native").needs
    memory = (needs.least + needs.total) // 2
    candidate = Running(backend="native", memory=str(memory)).candidate(opened, None)
    assert 0 < candidate.options["resident"] < needs.mapped
    status, out, err = gptoss_("verify", path, "-b", "native", "--memory", memory, "--length", 20)
    if "compiled core" in err:
        pytest.skip(err)
    assert status == 0, out


def test_answers_are_saved_and_replayed(gptoss_, toy, tmp_path):
    path, text = tmp_path / "answers.npz", tmp_path / "text.txt"
    text.write_text("abc 123 and so on\n")
    for teacher in (text, "abc 123 and so on\n"):
        status, out, _ = gptoss_(
            "verify", toy, "-b", "reference", "--teacher", teacher, "--save", path
        )
        assert status == 0 and "the same likeliest 100.00%" in out
    status, out, _ = gptoss_("verify", toy, "-b", "torch", "--replay", path, "--json")
    said = json.loads(out)
    assert status == 0 and 0.0 <= said["kl"] < 0.1 and said["perplexity"] > 1.0
    status, _, err = gptoss_("verify", "nano", "--replay", path)
    assert status == 2 and "another model's answers" in err
    status, out, _ = gptoss_("verify", toy, "-b", "reference", "--teacher", "no file " * 100)
    assert status == 0 and "the same likeliest 100.00%" in out
    status, _, err = gptoss_("verify", toy, "--teacher", "abc", "--save", text)
    assert status == 1 and "holds something else" in err and text.read_text().startswith("abc")


def test_a_trace_is_written_and_differs_where_it_was_edited(gptoss_, toy, tmp_path):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    asked = ("generate", toy, "-q", "--raw", "-p", "abc", "-l", 5, "-t", 0, "-b", "reference")
    status, plain, _ = gptoss_(*asked)
    assert (status, plain) == gptoss_(*asked, "--trace", a, "--point", "attn.q")[:2]
    assert "point/block.0.attn.q" in TraceFile.load(a).arrays
    status, out, _ = gptoss_("diff", a, "-b", "reference")
    assert status == 0 and "the values are the same" in out
    token = (TraceFile.load(a).tokens[2] + 1) % 100
    status, out, _ = gptoss_("diff", a, "--edit", f"2={token}", "--out", b, "-b", "reference")
    assert status == 1 and "values part at token 2, embedding" in out
    status, out, _ = gptoss_("diff", a, b, "--json")
    assert status == 1 and json.loads(out)["tokens"] == 2
    broken = TraceFile.load(a)
    broken.arrays["sketch"][1, 0] = np.nan
    broken.save(b)
    status, out, _ = gptoss_("diff", a, b, "--json")
    assert status == 1 and json.loads(out, parse_constant=pytest.fail)["size"] is None
    assert gptoss_("diff", b, b)[0] == 0
    status, _, err = gptoss_("diff", a, "--edit", "2")
    assert status == 2 and "is not AT=TOKEN" in err
    status, _, err = gptoss_("diff", a, "--edit", "2=99999999999")
    assert status == 2 and "is not AT=TOKEN" in err
    status, _, err = gptoss_("diff", a, b, "--list")
    assert status == 2 and "--list takes one file" in err
    status, _, err = gptoss_("diff", a, b, "--on", "nano")
    assert status == 2 and "read anew" in err
    (tmp_path / "c").write_text("nothing")
    status, _, err = gptoss_("diff", a, tmp_path / "c")
    assert status == 1 and "is no trace" in err
    status, _, err = gptoss_("diff", a, "--out", tmp_path / "c")
    assert status == 1 and "holds something else" in err
    status, _, err = gptoss_("diff", a, "--out", tmp_path / "no" / "where")
    assert status == 1 and "--out names a file in a directory" in err
    status, _, err = gptoss_("generate", toy, "-p", "a", "--point", "attn.q")
    assert status == 2 and "--point is for --trace" in err
