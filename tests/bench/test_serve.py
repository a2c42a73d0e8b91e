"""``gptoss bench serve`` beside a server whose pace is known."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss.bench import latency
from gptoss.bench.latency import Outcome, percentiles, summary
from gptoss.bench.serve import Load, Server, first_model, serve
from gptoss.errors import GptOssError
from tests.bench.stub import CROWD

DELAY, GAP = 0.08, 0.01


@pytest.fixture(scope="module")
def url():
    command = [sys.executable, str(Path(__file__).with_name("stub.py"))]
    command += ["--delay", str(DELAY), "--gap", str(GAP)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stub:
        yield f"http://127.0.0.1:{int(stub.stdout.readline())}/v1"
        stub.terminate()


def test_what_is_reported_is_what_the_server_did(bench, url):
    how = ("--clients", 4, "--requests", 12, "--answers", "5:20", "--prompts", "3:9")
    status, out, err = bench("serve", url, "--key", "k", *how)
    assert status == 0 and err == ""
    *table, line = out.splitlines()
    f = json.loads(line)
    asked = Load(requests=12, clients=4, prompt=(3, 9), answer=(5, 20)).questions()
    assert (f["benchmark"], f["model"], f["loop"]) == ("serve", "steady", "closed")
    assert f["completed"] == 12 and f["failures"] == {} and f["counted_by"] == "usage"
    assert f["completion_tokens"] == sum(most for _, most in asked)
    assert f["prompt_tokens"] == sum(len(words.split()) for words, _ in asked)
    assert f["tokens_per_second"] == f["completion_tokens"] / f["seconds"]
    # The stub cannot be early; how late the machine makes both is not this test's matter.
    assert f["ttft"]["p50"] >= DELAY
    assert f["inter_token"]["p50"] > 0
    whole = statistics.median(DELAY + (most - 1) * GAP for _, most in asked)
    assert f["end_to_end"]["p50"] >= 0.95 * whole
    assert f["seconds"] >= max(DELAY + (most - 1) * GAP for _, most in asked)
    for word in ("tokens/s", "first text", "between tokens", "whole answer", "p99", "generator"):
        assert word in "\n".join(table)


@pytest.mark.slow
def test_64_streams_at_once_are_measured_as_they_are(url):
    """6,400 tokens a second; on a machine that has nothing else to do."""
    f = serve(Server(url=url, model="steady"), Load(requests=256, clients=64, answer=(200, 200)))
    assert f["completed"] == 256 and f["generator_cpu"] < 0.9
    assert f["ttft"]["p50"] == pytest.approx(DELAY, abs=0.02)
    assert f["inter_token"]["p90"] == pytest.approx(GAP, rel=0.05)
    assert f["end_to_end"]["p90"] == pytest.approx(DELAY + 199 * GAP, rel=0.05)


def test_an_open_loop_does_not_wait_for_answers(url):
    """This server answers nobody before all are there."""
    load = Load(requests=CROWD, rate=200.0, answer=(3, 3), prompt=(1, 1))
    f = serve(Server(url=url, model="crowd"), load)
    assert f["loop"] == "open" and f["completed"] == CROWD
    assert f["seconds"] >= load.arrivals()[-1]


def test_completions_and_counted_chunks(url):
    load = Load(requests=3, answer=(7, 7))
    by_usage = serve(Server(url=url, model="steady", api="completions"), load)
    assert (by_usage["counted_by"], by_usage["completion_tokens"]) == ("usage", 21)
    by_chunks = serve(Server(url=url.removesuffix("/v1"), model="uncounted"), load)
    assert (by_chunks["counted_by"], by_chunks["completion_tokens"]) == ("chunks", 21)
    assert by_chunks["prompt_tokens"] is None


@pytest.mark.parametrize(
    "model, kind",
    [
        ("full", "status 429"),
        ("plain", "no event stream"),
        ("cut", "connection lost (IncompleteRead)"),
        ("error", "error event"),
        ("hang", "timeout"),
    ],
)
def test_failures_by_kind(url, model, kind):
    server = Server(url=url, model=model, timeout=0.5 if model == "hang" else 60.0)
    with pytest.raises(GptOssError, match="every request failed") as raised:
        serve(server, Load(requests=2, clients=2, answer=(4, 4)))
    assert str(raised.value).endswith(kind)


def test_nobody_there(bench):
    nobody = "http://127.0.0.1:9/v1"
    for extra in ((), ("--name", "x")):
        status, out, err = bench("serve", nobody, "--requests", 1, *extra)
        assert status == 1 and out == "" and "refused" in err


def test_models_need_the_key(url):
    assert first_model(url, "k") == "steady"
    with pytest.raises(GptOssError, match="answers 401"):
        first_model(url, None)


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "nano"),
        ("serve", "ftp://x"),
        ("serve", "http://x", "--rows", 2),
        ("serve", "http://x", "--rate", 1, "--clients", 2),
        ("serve", "http://x", "--answers", "9:1"),
        ("serve", "http://x", "--answers", "few"),
        ("serve", "http://x", "--rate", -1),
        ("decode", "nano", "--clients", 2),
        ("decode", "nano", "--ignore-eos"),
    ],
)
def test_a_wrong_command_line_is_refused(bench, words):
    status, out, err = bench(*words)
    assert status == 2 and out == "" and err.startswith("gptoss bench: ")


def test_a_key_in_the_environment_disturbs_no_other_benchmark(bench, monkeypatch):
    monkeypatch.setenv("GPTOSS_API_KEY", "k")
    status, out, err = bench("decode", "nano", "--tokens", 3)
    assert status == 2 and "--tokens is not for decode" in err


def test_the_same_seed_asks_the_same():
    one, two, other = (Load(requests=50, rate=3.0, seed=s) for s in (1, 1, 2))
    assert one.questions() == two.questions() != other.questions()
    assert one.arrivals() == two.arrivals() != other.arrivals()
    lengths = [most for _, most in one.questions()]
    assert min(lengths) >= 16 and max(lengths) <= 128 and len(set(lengths)) > 20
    assert 50 / one.arrivals()[-1] == pytest.approx(3.0, rel=0.5)


def outcome(due, sent, arrivals, end, **more):
    return Outcome(due, sent, arrivals, end, **more)


def test_waiting_counts_from_when_a_request_was_due():
    late = outcome(1.0, 1.5, [2.0, 2.25, 3.0], 3.5, prompt=4, completion=5)
    lost = outcome(1.0, 1.0, [1.1], 9.0, failure="cut off")
    f = summary("serve", {}, [late, lost], seconds=10.0, burnt=1.0)
    assert f["ttft"]["p50"] == 1.0 and f["end_to_end"]["p99"] == 2.5
    assert f["inter_token"]["p50"] == 0.25  # five tokens came in three chunks
    assert f["stall"]["p50"] == 0.75 and f["late"]["p50"] == 0.25
    assert f["tokens_per_second"] == 0.5 and f["generator_cpu"] == 0.1
    assert f["completed"] == 1 and f["failures"] == {"cut off": 1}


def test_percentiles_of_nothing_are_none():
    assert percentiles([]) is None
    assert percentiles([float(i) for i in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert latency.TIMES.keys() <= summary("serve", {}, [outcome(0, 0, [1], 1)], 1, 0).keys()
