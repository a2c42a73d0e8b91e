"""The kit sees every planted bug, suspects nobody who has none, and understands servers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.backends.protocol import Batch
from gptoss.checkpoint.open import open_checkpoint
from gptoss.errors import BackendUnavailable, GptOssError
from gptoss.model.weights import specs
from gptoss.verify.diagnosis import RIGHT, diagnose, distance, judge
from gptoss.verify.mutants import BUGS, planted
from gptoss.verify.patients import Seen, Step, answers, local, log_softmax, said, table
from gptoss.verify.probes import PROBE, prompts, write_probe
from gptoss.verify.remote import Server
from tests.verify.test_verify import REST

LENGTHS = (1, 3, 5, 13, 130, 150, 200, 300)  # a part of the kit's, for time
EQUAL = {"positions counted from one"}  # attention sees differences of positions only
TWINS = [  # the same function, got wrong in two places
    {"ramp upside down", "beta fast and slow swapped"},
    {"no sink", "shares with the sink's sum to one again"},
]
FAINT = {"gate clamped from below too"}  # 5e-5 of an activation: under what bfloat16 rounds


@pytest.fixture(scope="module")
def asked(tokenizer):
    return [tokenizer.encode(text) for text in prompts(tokenizer, LENGTHS)]


@pytest.fixture(scope="module")
def seen(probe, asked):
    patient = local(load_backend("reference", PROBE, probe.__getitem__))
    return [patient(prompt) for prompt in asked]


@pytest.fixture(scope="module")
def ours(probe, seen):
    """What the reference says of the same candidates, right and with each bug."""
    read = probe.__getitem__
    right = {RIGHT: answers(PROBE, read, seen)}
    return right | {name: answers(PROBE, read, seen, name) for name in BUGS}


def noisy(said, nats, seed=0):
    draw = np.random.default_rng(seed)
    return said + nats * draw.standard_normal(said.shape)


def test_there_are_enough_bugs():
    assert len(BUGS) > 25
    assert set(BUGS) >= EQUAL | FAINT


@pytest.mark.parametrize("nats", [0.0, 0.01])  # as float32, and as bfloat16 rounds
def test_every_bug_is_named(ours, nats):
    hidden = EQUAL | (FAINT if nats else set())
    for name in set(BUGS) - hidden:
        found = judge(noisy(ours[name], nats), ours)
        same = next((twins for twins in TWINS if name in twins), {name})
        assert set(found.suspects) == same, f"{name} is taken for {found.fits}"
        assert found.explained and not found.healthy


@pytest.mark.parametrize("nats", [0.0, 0.01])
def test_who_has_no_bug_is_suspected_of_none(ours, nats):
    hidden = EQUAL | (FAINT if nats else set())
    for seed in range(5):
        found = judge(noisy(ours[RIGHT], nats, seed), ours)
        assert found.healthy and not found.suspects
        assert set(found.fits) == hidden | {RIGHT}


def test_what_no_bug_of_the_list_explains_is_not_healthy(ours):
    found = judge(noisy(ours[RIGHT], 0.2), ours)
    assert not found.healthy and not found.explained
    assert "no bug of the list explains it" in str(found)


@pytest.mark.parametrize(
    "name, how",
    [
        ("native", {"precision": "exact"}),
        ("native", {"precision": "fast"}),
        ("torch", {"dtype": "float32"}),
        ("torch", {"dtype": "bfloat16"}),
        *(pytest.param(name, how, marks=pytest.mark.slow) for name, how in REST),
    ],
)
def test_our_own_backends_have_none(probe, ours, seen, name, how):
    """The same texts, forced through the backend, so that the answers above serve."""
    try:
        backend = load_backend(name, PROBE, probe.__getitem__, **how)
    except BackendUnavailable as missing:
        pytest.skip(str(missing))
    found = judge(said(backend, seen), ours)
    rounded = how.get("precision") == "small"  # to 4 bits: farther off than bugs are
    assert not found.suspects and found.healthy != rounded, str(found)


def test_two_bugs_at_once_are_two_bugs(probe, asked, monkeypatch):
    two = ["no sink", "plain SiLU"]
    some = {name: BUGS[name] for name in [*two, "no final norm", "no router bias"]}
    monkeypatch.setattr("gptoss.verify.diagnosis.BUGS", some)
    read = probe.__getitem__
    with planted(*two):
        patient = local(load_backend("reference", PROBE, read))
        told = {len(prompt): patient(prompt) for prompt in asked}
    found = diagnose(PROBE, read, lambda prompt: told[len(prompt)], asked)
    assert found.suspects == [" + ".join(two)]


def test_bugs_are_gone_when_they_were_there(probe, seen, ours):
    for name in ("nibbles in GGUF's order", "YaRN range rounded", "no sink"):
        with planted(name):
            pass
    again = answers(PROBE, probe.__getitem__, seen)
    assert np.array_equal(again, ours[RIGHT])


def test_bugs_of_one_passage_exclude_each_other():
    with (
        pytest.raises(ValueError, match="does not go with"),
        planted("no sink", "sink dropped from the front"),
    ):
        pass
    with pytest.raises(ValueError, match="no bug called 'hiccups'"), planted("hiccups"):
        pass


def test_the_kits_checkpoint_is_what_its_weights_say(tmp_path, probe):
    opened = open_checkpoint(write_probe(tmp_path / "probe"))
    assert opened.config == PROBE
    for spec in specs(PROBE):
        dense = probe[spec.name] if spec.kind == "dense" else probe[spec.name].decode()
        assert np.array_equal(opened.dense(spec.name), dense), spec.name


def test_a_texts_tokens_are_as_many_as_asked_and_come_back(tokenizer, asked):
    assert [len(prompt) for prompt in asked] == list(LENGTHS)
    assert all(tokenizer.encode(tokenizer.decode(prompt)) == prompt for prompt in asked)


# Servers, as they are: each of these answers as one that was met.


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
    with pytest.raises(ValueError, match="no address"):
        Server("localhost", tokenizer)


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
