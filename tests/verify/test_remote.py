"""Servers are understood, as they are: each of those here answers as one that was met."""

import json
import socket
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.backends.protocol import Batch
from gptoss.errors import GptOssError
from gptoss.verify.diagnosis import RIGHT, distance, judge
from gptoss.verify.mutants import planted
from gptoss.verify.patients import Seen, Step, answers, local, log_softmax, said, table
from gptoss.verify.probes import PROBE, write_probe
from gptoss.verify.remote import Server


class Stub:
    """A server of one model, whose completions are what ``form`` makes of a patient's steps."""

    def __init__(self, patient, tokenizer, form, *, takes_ids=True, takes_number=True, scores=None):
        def answer(body):
            prompt = body["prompt"]
            if scores is not None and (found := scores(body)) is not None:
                return found
            if isinstance(prompt, str):
                prompt = tokenizer.encode(prompt)
            elif not takes_ids:
                return 422, {"detail": "prompt must be text"}
            if not takes_number and body["logprobs"] is not True:
                return 400, {"error": "logprobs must be a bool"}
            return 200, {"choices": [{"logprobs": form(patient(prompt).steps)}]}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.say(200, {"data": [{"id": "some"}]})

            def do_POST(self):
                size = int(self.headers["Content-Length"])
                self.say(*answer(json.loads(self.rfile.read(size))))

            def say(self, status, what):
                said = json.dumps(what).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *args):
                pass

        self.httpd = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        return self.url

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()


def objects(steps):
    """llama.cpp's form."""
    return {
        "content": [
            {
                "id": step.token,
                "logprob": step.top[step.token],
                "top_logprobs": [{"id": t, "logprob": p} for t, p in step.top.items()],
            }
            for step in steps
        ]
    }


def misnamed(steps):
    """mlx-lm's: the first of the candidates, in no order, stands for the token drawn."""
    told = objects(steps)
    for each in told["content"]:
        each["top_logprobs"].reverse()
        each["id"] = each["top_logprobs"][0]["id"]
    return told


def lists(tokenizer):
    """OpenAI's first form; tokens by name only."""
    from gptoss.verify.remote import names

    spelled = {token: name for name, token in names(tokenizer).items() if token is not None}

    def form(steps):
        tops = [{spelled[t]: p for t, p in s.top.items() if t in spelled} for s in steps]
        return {"tokens": [spelled.get(s.token, "") for s in steps], "top_logprobs": tops}

    return form


@pytest.mark.parametrize("kind", ["llama.cpp", "mlx-lm", "lists"])
def test_a_servers_answers_are_understood(probe, tokenizer, seen, kind):
    patient = local(load_backend("reference", PROBE, probe.__getitem__))
    form = {"llama.cpp": objects, "mlx-lm": misnamed, "lists": lists(tokenizer)}[kind]
    picky = kind == "mlx-lm"
    with Stub(patient, tokenizer, form, takes_ids=not picky, takes_number=not picky) as url:
        server = Server(url, tokenizer)
        assert server.model == "some"
        for row in seen[:4]:
            answer = server(row.prompt)
            steps = answer.steps
            assert answer.prompt == row.prompt and not answer.scored
            assert [s.token for s in steps[:-1]] == [s.token for s in row.steps][: len(steps) - 1]
            for ours, theirs in zip(steps, row.steps, strict=False):
                assert ours.top.items() <= theirs.top.items()
        assert len(server.forms) == 1


def test_a_server_that_tells_no_logprobs_is_said_to(probe, tokenizer, asked):
    patient = local(load_backend("reference", PROBE, probe.__getitem__))
    silent, refused = Stub(patient, tokenizer, lambda steps: None), "told no log-probabilities"
    with silent as url, pytest.raises(GptOssError, match=refused):
        Server(url, tokenizer)(asked[0])
    with pytest.raises(GptOssError, match="cannot be reached"):
        Server(url, tokenizer)
    for address in ("localhost", "http://", "http://localhost:99999"):
        with pytest.raises(ValueError, match="no address"):
            Server(address, tokenizer, model="some")


@pytest.mark.parametrize(
    "reply, why",
    [
        (b"", "cannot be reached"),  # it hangs up
        (b"HTTP/1.1 401 No\r\nContent-Length: 4\r\n\r\nkey?", "names no model .401: .key"),
        (None, "no answer in 0.5 seconds"),
    ],
)
def test_why_a_server_names_no_model(tokenizer, reply, why):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def answer():
            with closing(listening.accept()[0]) as connection:
                connection.recv(4096)
                if reply is None:
                    connection.recv(4096)  # until the other gives up
                else:
                    connection.sendall(reply)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(GptOssError, match=why):
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            Server(url, tokenizer, timeout=0.5 if reply is None else 60)


def thoughtful(backend, tokens):
    """What it thinks of the ten likeliest behind every token of a text."""
    cache = backend.new_cache(max_tokens=len(tokens))
    batch = Batch.of([tokens], [0], [cache.open()], range(len(tokens)))
    thoughts = []
    for logits in backend.to_numpy(backend.forward(batch, cache)):
        logprobs = log_softmax(logits)
        best = np.argsort(-logprobs, kind="stable")[:10].tolist()
        thoughts.append({t: float(logprobs[t]) for t in best})
    return thoughts


@pytest.mark.parametrize("kind", ["echo", "vllm", "shy"])
def test_what_a_server_thinks_of_the_prompt_is_asked_for(probe, tokenizer, seen, kind):
    """In both forms; where the prompt is not told, or asking so is refused, without."""
    backend = load_backend("reference", PROBE, probe.__getitem__)
    patient, asked = local(backend), []

    def scores(body):
        asked.append(body)
        prompt = body["prompt"]
        if kind == "echo" and body.get("echo"):
            steps = patient(prompt).steps
            thoughts = thoughtful(backend, prompt)[:-1]
            told = lists(tokenizer)([Step(0, {}), *(Step(0, t) for t in thoughts), *steps])
            told["top_logprobs"][0] = None
            return 200, {"choices": [{"logprobs": told}]}
        if kind == "vllm" and body.get("prompt_logprobs"):
            thoughts = thoughtful(backend, prompt)[:-1]
            said = [{str(t): {"logprob": p} for t, p in one.items()} for one in thoughts]
            told = {"logprobs": lists(tokenizer)(patient(prompt).steps)}
            return 200, {"choices": [told | {"prompt_logprobs": [None, *said]}]}
        if kind != "echo" and body.get("echo"):
            return 400, {"error": "echo is not supported"}
        return None

    rows = seen[:4]
    with Stub(patient, tokenizer, lists(tokenizer), scores=scores) as url:
        server = Server(url, tokenizer)
        found = [server(row.prompt) for row in rows]
        assert len(server.forms) == 1
        assert len(asked) == {"echo": 4, "vllm": 4 + 4, "shy": 4 + 8}[kind]
    for answer, row in zip(found, rows, strict=True):
        assert answer.steps[0].top.items() <= row.steps[0].top.items()
        assert len(answer.scored) == (0 if kind == "shy" else len(row.prompt) - 1)
        for ours, theirs in zip(answer.scored, thoughtful(backend, row.prompt), strict=False):
            assert ours and ours.items() <= theirs.items()


def test_prompts_that_are_told_are_compared_too(probe, seen):
    backend = load_backend("reference", PROBE, probe.__getitem__)
    read, last = probe.__getitem__, seen[-1]  # of 300 tokens
    with planted("no sink"):
        bugged = load_backend("reference", PROBE, probe.__getitem__)
        scored = thoughtful(bugged, last.prompt)[:-1]
        steps = local(bugged)(last.prompt).steps
    scored[7] = {}  # what could not be read is left out
    whole = Seen(last.prompt, steps, scored)
    theirs = np.array([[*thoughts.values()] for thoughts in whole.thoughts if thoughts])
    assert len(theirs) == 298 + len(steps)
    np.testing.assert_allclose(answers(PROBE, read, [whole], "no sink"), theirs, atol=1e-4)
    assert np.abs(said(backend, [whole]) - theirs).mean() > 0.05
    ours = {RIGHT: answers(PROBE, read, [whole])}
    ours |= {n: answers(PROBE, read, [whole], n) for n in ("no sink", "plain SiLU")}
    assert judge(theirs, ours).suspects == ["no sink"]


def test_our_own_server_tells_what_it_thinks_of_the_prompt(probe, tokenizer, seen, tmp_path):
    for library in ("fastapi", "uvicorn", "llguidance", "openai", "httpx2"):
        pytest.importorskip(library)
    from gptoss import LLM
    from tests.server.conftest import running

    llm = LLM.load(write_probe(tmp_path / "probe"), "reference")
    with running(llm=llm) as served:
        found = [Server(served.url, tokenizer)(row.prompt) for row in seen[3:6]]
    for answer, row in zip(found, seen[3:6], strict=True):
        assert len(answer.scored) == len(row.prompt) - 1 and len(answer.steps) == 4
    told = table([[*t.values()] for row in found for t in row.thoughts if t])
    ours = said(load_backend("reference", PROBE, probe.__getitem__), found)
    assert distance(told, ours) < 1e-4  # it leaves padding out of its softmax
