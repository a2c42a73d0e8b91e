"""``--trace`` of ``chat`` and ``serve``, and what ``gptoss diff`` makes of the files."""

import json
import signal
import threading

import httpx2
import numpy as np
import pytest

from gptoss.llm.models import NANO
from gptoss.text.tokenizer import Tokenizer
from gptoss.verify.trace import TraceFile
from gptoss.verify.traces import MAGIC, Traces
from tests.cli.conftest import run, start

WORDS = Tokenizer.from_file(NANO / "tokenizer.json")
HOW = ("-q", "-b", "reference")
GREEDY = (*HOW, "-t", "0")


def test_chat_traces_its_last_answer_and_says_the_same(tmp_path):
    path = tmp_path / "chat.npz"
    talk = b"2+2?\n/effort low\nand 3+3?\n"
    status, plain, _ = run("chat", "nano", *GREEDY, stdin=talk)
    assert status == 0
    status, out, _ = run("chat", "nano", *GREEDY, "--trace", path, "--point", "norm", stdin=talk)
    assert (status, out) == (0, plain)
    trace = TraceFile.load(path)
    said, prompt = WORDS.decode(trace.tokens), trace.about["prompt"]
    assert "2+2?" in said and "and 3+3?" in said  # all that the last answer followed
    assert WORDS.decode(trace.tokens[:prompt]).endswith("<|start|>assistant")
    assert 0 < prompt < len(trace.tokens) == len(trace.arrays["point/norm"])
    drawn = trace.arrays["ids"][prompt - 1 : -1, 0]
    assert drawn.tolist() == trace.tokens[prompt:]  # greedy: the likeliest came


def test_chat_without_a_word_leaves_no_trace(tmp_path):
    status, _, _ = run("chat", "nano", *GREEDY, "--trace", tmp_path / "none.npz", stdin=b"/quit\n")
    assert status == 0 and not (tmp_path / "none.npz").exists()


@pytest.mark.parametrize(
    "words, why, status",
    [
        (["chat", "--trace", "no/where/a.npz"], "--trace names a file in a directory", 1),
        (["chat", "--point", "attn.q"], "--point is for --trace", 2),
        (["chat", "--trace", "{here}/t", "--point", "attn.Q"], "'attn.Q' is none of", 2),
        (["serve", "--trace-size", "1GB"], "--trace-size is for --trace", 2),
        (["serve", "--trace", "{here}/t", "--trace-size", "much"], "is not a size such as", 2),
        (["serve", "--port", "0", "--trace", "{here}/letter"], "no file of traces", 1),
        (["generate", "-p", "x", "--trace", "{here}/many"], "holds something else", 1),
        (["diff", "{here}/letter", "--list"], "no file of many traces", 1),
    ],
)
def test_a_wrong_trace_is_a_sentence(gptoss_, tmp_path, words, why, status):
    (tmp_path / "letter").write_text("Dear reader, this is no trace at all.")
    (tmp_path / "many").write_bytes(MAGIC)
    found, out, err = gptoss_(*(word.format(here=tmp_path) for word in words))
    if "pip install" in err:
        pytest.skip(err)
    assert found == status and why in err and not out
    assert (tmp_path / "letter").read_text().startswith("Dear")


class Served:
    """A server in a process of its own, that records."""

    def __init__(self, path, *more):
        self.process = start("serve", "nano", "--port", 0, "--trace", path, *HOW, *more)
        self.url = self.process.stdout.readline().decode().strip()
        assert self.url, self.process.communicate()[1].decode()

    def ask(self, id, text, n=1, tokens=24):
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "n": n}
        with httpx2.Client(timeout=100) as client:
            answer = client.post(
                f"{self.url}/chat/completions",
                json=body | {"max_tokens": tokens, "reasoning_effort": "low", "logprobs": True},
                headers={"x-request-id": id},
            )
        assert answer.status_code == 200 and answer.headers["x-request-id"] == id
        return answer.json()

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.communicate(timeout=100)


@pytest.fixture
def served(tmp_path):
    for library in ("fastapi", "uvicorn", "llguidance"):
        pytest.importorskip(library)
    running = []

    def begin(name, *more):
        running.append(Served(tmp_path / name, *more))
        return running[-1], tmp_path / name

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def test_a_server_records_every_request_beside_others(served, gptoss_):
    server, path = served("first")
    asked = {"a": "2+2?", "b": "What is 12+30?", "c": "Reverse the word stone"}
    told = {}
    threads = [
        threading.Thread(target=lambda i=i, t=t: told.update({i: server.ask(i, t)}))
        for i, t in asked.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.ask("two", "3+4?", n=2)
    server.end()
    assert server.process.returncode in (0, -signal.SIGTERM)
    traces = Traces(path)
    assert sorted(traces.names) == ["a", "b", "c", "two", "two.1"]
    for id, text in asked.items():
        trace = traces.load(id)
        assert text in WORDS.decode(trace.tokens[: trace.about["prompt"]])
        assert np.isfinite(trace.arrays["sink"]).all()
        usage = told[id]["usage"]
        assert trace.about["prompt"] == usage["prompt_tokens"]
        assert len(trace.tokens) == usage["prompt_tokens"] + usage["completion_tokens"] - 1
    status, out, _ = gptoss_("diff", path, "--list", "--json")
    listed = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [said["trace"] for said in listed] == traces.names
    status, out, _ = gptoss_("diff", f"{path}#two", f"{path}#two.1")
    assert status == 0 and "the values are the same" in out  # greedy: both answers are one
    status, out, _ = gptoss_("diff", f"{path}#a", f"{path}#b")
    assert status == 1 and "is another" in out
    status, out, err = gptoss_("diff", f"{path}#b", "-b", "native")  # read anew, on another backend
    assert status == 0 or "compiled core" in err
    token = (traces.load("b").tokens[5] + 1) % 1000
    status, out, _ = gptoss_("diff", f"{path}#b", "--edit", f"5={token}")
    assert status == 1 and "values part at token 5, embedding" in out
    status, _, err = gptoss_("diff", path)
    assert status == 1 and "holds 5 traces; say" in err


def test_what_was_told_is_there_after_a_kill_and_two_runs_compare(served, gptoss_):
    first, path = served("first")
    first.ask("same", "2+2?")
    first.ask("mine", "3+3?")
    first.end(signal.SIGKILL)
    with open(path, "ab") as file:
        file.write(b"\xff\0\0\0half a record")
    again, other = served("second", "--point", "attn.q")
    again.ask("same", "2+2?")
    again.ask("mine", "3+4?")
    again.end()
    status, out, _ = gptoss_("diff", path, other)
    assert status == 1 and out.startswith("mine: ") and "is another" in out
    status, out, _ = gptoss_("diff", f"{path}#same", f"{other}#same", "--json")
    assert status == 0 and json.loads(out)["token"] is None
    more, _ = served("first")  # goes on in the same file
    more.ask("same", "2+2?")
    more.end()
    assert Traces(path).names == ["same", "mine", "same.1"]
    status, out, _ = gptoss_("diff", f"{path}#same", f"{path}#same.1")
    assert status == 0


def test_training_traces_its_steps_and_two_runs_compare(gptoss_, toy, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("gptoss.train.trainer.curves", lambda rows, path: None)
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    one, two = tmp_path / "one.traces", tmp_path / "two.traces"
    sft = ("train", "sft", toy, data, "--steps", 3, "--tokens", 300, "--threads", 1, "--warmup", 0)
    for path in (one, two):
        run = ("--out", tmp_path / f"run-{path.stem}", "--trace", path, "--trace-every", 2)
        status, _, err = gptoss_(*sft, *run)
        assert status == 0, err
    status, out, _ = gptoss_("diff", one, "--list")
    assert status == 0 and [line.split(":")[0] for line in out.splitlines()] == ["step-1", "step-3"]
    status, out, _ = gptoss_("diff", one, two)
    assert status == 0 and out.startswith("2 traces, the last step-3: ")
    other = ("--out", tmp_path / "other", "--trace", tmp_path / "other.traces", "--lr", "1e-2")
    assert gptoss_(*sft, *other)[0] == 0
    status, out, _ = gptoss_("diff", one, tmp_path / "other.traces")
    assert status == 1 and out.startswith("step-3: ") and "values part at token 0" in out
    status, _, err = gptoss_("diff", f"{one}#step-1")
    assert status == 2 and "is not read anew" in err
    status, _, err = gptoss_(*sft, "--out", tmp_path / "no", "--trace-every", 2)
    assert status == 2 and "are for --trace" in err and not (tmp_path / "no").exists()
