"""``gptoss bench`` on the smallest models: what it prints, and what it refuses."""

import json

import pytest

from gptoss.bench import machine
from gptoss.bench.subject import Rows, Subject
from gptoss.errors import CacheMiss
from tests.llm.toy import write_toy

QUICK = ("--rounds", 1, "-q")
SMALL = {
    "decode": ("--steps", 2, "--context", 5),
    "prefill": ("--tokens", 9),
    "load": (),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(write_toy(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("what", ["decode", "prefill", "load"])
def test_the_last_line_is_one_json_object(bench, what):
    status, out, err = bench(what, "nano", "-b", "reference", *SMALL[what], *QUICK)
    assert status == 0 and err == ""
    *table, line = out.splitlines()
    facts = json.loads(line)
    assert facts["benchmark"] == what and facts["backend"] == "reference"
    assert facts["tokens_per_second"] > 0
    assert facts["tokens_per_second_min"] <= facts["tokens_per_second"]
    assert facts["tokens_per_second"] <= facts["tokens_per_second_max"]
    assert len(facts["seconds"]) == 1 and len(facts["read_bandwidths"]) == 2
    assert facts["share_of_bandwidth"] == facts["bytes_per_second"] / facts["read_bandwidth"]
    assert facts["share_of_peak"] == facts["operations_per_second"] / facts["peak_operations"]
    assert facts["peak_memory_bytes"] > 10e6
    assert facts["machine"]["cores"] >= 1 and "numpy" in facts["versions"]
    said = "\n".join(table)
    for word in (what, "bytes", "operations", "memory", "machine", "versions"):
        assert word in said
    assert ("first token" if what == "load" else "tokens/s") in said


@pytest.mark.parametrize("backend", ["reference", "native", "torch", "mlx"])
def test_every_backend_is_measured(bench, toy, backend):
    how = ("-b", backend, "--json", *QUICK, "--rounds", 2)
    status, out, err = bench("decode", toy, *how, *SMALL["decode"])
    if status == 1:
        assert "needs" in err
        pytest.skip(err)
    facts = json.loads(out)  # that line and nothing else
    assert facts["backend"] == backend and len(facts["seconds"]) == 2
    assert (facts["precision"] is None) == (backend not in ("native", "mlx"))


def test_precision_and_threads_are_passed_on(bench, toy):
    how = ("--precision", "exact", "--threads", 1, "--json")
    status, out, err = bench("prefill", toy, *how, *SMALL["prefill"], *QUICK)
    if status == 1:
        pytest.skip(err)
    facts = json.loads(out)
    assert (facts["backend"], facts["precision"], facts["threads"]) == ("native", "exact", 1)
    if "float32 and" in facts["arithmetic"]:  # experts are a part: between half and all of int8
        assert facts["peak_operations"] < max(p.get("int8", 0) for p in facts["peaks"].values())


def test_rows_are_counted_and_share_what_is_read(bench, toy):
    found = {}
    for rows in (1, 3):
        _, out, _ = bench(
            "decode", toy, "-b", "reference", "--rows", rows, "--json", *SMALL["decode"], *QUICK
        )
        found[rows] = json.loads(out)
        assert found[rows]["rows"] == rows
    assert found[3]["bytes_per_token"] < found[1]["bytes_per_token"]
    assert found[3]["operations_per_token"] == found[1]["operations_per_token"]
    assert found[1]["experts_visited"] == 2 <= found[3]["experts_visited"] <= 4


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["run"], "none of decode, prefill, load"),
        ([], "WHAT is missing"),
        (["load", "nano", "--steps", 3], "--steps is not for load"),
        (["prefill", "nano", "--rows", 3], "--rows is not for prefill"),
        (["decode", "nano", "--tokens", 3], "--tokens is not for decode"),
        (["decode", "nano", "--rows", 0], "--rows"),
        (["decode", "nano", "--rounds", 0], "--rounds"),
        (["decode", "nano", "--context", 2040], "2072 tokens in a row"),
        (["prefill", "nano", "--tokens", 9999], "9999 tokens in a row"),
        (["decode", "nano", "-b", "abacus"], "abacus"),
        (["decode", "nano", "-b", "torch", "--precision", "fast"], "precision"),
        (["load", "nano", "-b", "reference", "--dtype", "bfloat16"], "bfloat16"),
        (["load", "nano", "-b", "reference", "--threads", 2], "threads"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(bench, words, sentence):
    status, out, err = bench(*words)
    assert status == 2 and out == "" and sentence in err and len(err.splitlines()) == 1


def test_a_model_that_is_not_there_is_one_sentence(bench):
    for what in SMALL:
        status, out, err = bench(what, "/no/such")
        assert status == 1 and out == "" and len(err.splitlines()) == 1


def test_a_process_that_cannot_load_says_why(bench, toy, monkeypatch):
    from gptoss.bench import load

    monkeypatch.setattr(load, "ROOM", 1)  # less than the prompt
    status, out, err = bench("load", toy, "-b", "reference", *QUICK)
    assert status == 1 and out == "" and "room" in err and len(err.splitlines()) == 1


def test_every_round_does_the_same(toy):
    subject = Subject(toy, 2, 12, backend="reference")
    rows = Rows(subject, subject.prompts(8))
    first = rows.fill()
    once = rows.step(first, 8)
    rows.step(once, 9)
    rows.rewind()
    assert rows.step(first, 8) == once


def test_what_a_cache_has_forgotten_is_read_again(toy, monkeypatch):
    subject = Subject(toy, 1, 12, backend="reference")
    rows = Rows(subject, subject.prompts(8))
    first = rows.fill()
    once = rows.step(first, 8)
    truncate = rows.cache.truncate

    def forgetful(slot, length):
        if length:
            raise CacheMiss("forgotten")
        truncate(slot, length)

    read = []
    forward = subject.backend.forward
    monkeypatch.setattr(rows.cache, "truncate", forgetful)
    monkeypatch.setattr(
        subject.backend, "forward", lambda batch, cache: read.append(batch) or forward(batch, cache)
    )
    rows.rewind()
    assert [batch.tokens.tolist() for batch in read] == rows.prompts
    assert rows.step(first, 8) == once


def test_experts_visited_are_those_of_the_trace(toy):
    subject = Subject(toy, 1, 600, backend="reference")
    rows = Rows(subject, subject.prompts(600))
    seen = []
    rows.fill(lambda batch, visited: seen.append((len(batch.tokens), visited)))
    assert [n for n, _ in seen] == [256, 256, 88]
    assert all(len(visited) == 2 and max(visited) <= 4 for _, visited in seen)


def test_peak_memory_is_known_everywhere(monkeypatch, tmp_path):
    here = machine.peak_memory()
    monkeypatch.setattr(machine, "PROC", tmp_path)  # not Linux
    assert machine.memory() is None and machine.storage_reads() is None
    elsewhere = machine.peak_memory()
    if elsewhere is not None:
        assert here / 2 < elsewhere < here * 2
