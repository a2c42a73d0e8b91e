"""Running it: who may come in, what is counted, and that nobody harms anybody else."""

import json
import logging
import re
import subprocess
import sys
import threading

import httpx2
import pytest

from gptoss.server.keys import Keys
from gptoss.server.logs import Lines
from tests.server.conftest import QUESTION, events, running, until

CHAT = "/v1/chat/completions"
LONG = {
    "prompt": "What is 12 + 30?",
    "max_tokens": 1500,
    "ignore_eos": True,
    "temperature": 1,
    "seed": 1,
}


def metrics(server):
    with server.client() as client:
        text = client.get("/metrics").text
    return dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_slot(server, stream):
    before = float(metrics(server)["gptoss_request_aborted_total"])
    with server.slowly(), server.client() as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
                next(answer.iter_lines())
        else:
            server.leave("/v1/completions", LONG)
        assert server.idle(), "the engine goes on for nobody"
    assert float(metrics(server)["gptoss_request_aborted_total"]) == before + 1
    assert server.served.worker.stats.completion > 0


def test_who_hangs_up_does_not_disturb_others(server):
    alone = server.chat().json()["choices"][0]["message"]["content"]
    with server.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())
            beside = server.chat().json()["choices"][0]["message"]["content"]
        after = server.chat().json()["choices"][0]["message"]["content"]
    assert alone == beside == after


def test_a_full_queue_says_so():
    with running(waiting=1) as server, server.client() as client:
        server.served.worker.engine.scheduler.rows = 1
        answers = []

        def ask():
            with server.client() as mine:
                answers.append(mine.post("/v1/completions", json=LONG))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        with server.slowly():
            for thread, state in zip(threads, ("running", "waiting"), strict=True):
                thread.start()
                until(lambda state=state: getattr(server.served.worker.stats, state) > 0)
            full = client.post("/v1/completions", json=LONG)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "rate_limit_exceeded"
        for thread in threads:
            thread.join()
        assert {a.status_code for a in answers} == {200}
        assert client.get("/health").status_code == 200


def test_a_deadline_ends_a_request():
    with running(timeout=50) as server:
        server.count_steps()
        answer = server.post("/v1/completions", LONG).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < LONG["max_tokens"]


def test_keys_are_asked_for_on_every_route_but_two():
    page = "http://page.example"
    with running(keys=["sesame", "zweite"], origins=[page]) as server, server.client() as client:
        key = {"authorization": "Bearer sesame"}
        document = client.get("/openapi.json", headers=key).json()
        for path in [*document["paths"], "/openapi.json", "/docs", "/nix"]:
            for method in ("GET", "POST"):
                response = client.request(method, path.replace("{model}", "nano"))
                open_ = path in ("/health", "/ready")
                assert response.status_code == ((200 if method == "GET" else 405) if open_ else 401)
        for said in ("Bearer nix", "Bearer", "sesame", "Basic sesame", "bearer sesame2"):
            response = client.get("/v1/models", headers={"authorization": said})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for said in ("Bearer sesame", "bearer zweite"):
            assert client.get("/v1/models", headers={"authorization": said}).is_success
        asked = {
            "origin": page,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        allowed = client.options(CHAT, headers=asked)
        assert allowed.headers["access-control-allow-origin"] == page


def test_web_pages_are_not_let_in_unasked(server):
    with server.client() as client:
        asked = {"origin": "http://page.example", "access-control-request-method": "POST"}
        for response in (client.options(CHAT, headers=asked), client.get("/health", headers=asked)):
            assert "access-control-allow-origin" not in response.headers


def test_no_key_is_as_good_as_none():
    assert Keys([]).fit(None) and Keys([""]).fit(b"Bearer x")
    assert not Keys(["ü"]).fit("Bearer ü".encode("latin-1"))
    assert Keys(["ü"]).fit("Bearer ü".encode())


def test_what_is_counted(server):
    before = metrics(server)
    answer = server.chat(max_tokens=20).json()["usage"]
    after = metrics(server)

    def more(name):
        return float(after[name]) - float(before.get(name, 0))

    assert more("gptoss_prompt_tokens_total") == answer["prompt_tokens"]
    assert more("gptoss_generation_tokens_total") == answer["completion_tokens"] == 20
    assert (
        more("gptoss_prefix_cache_hits_total") == answer["prompt_tokens_details"]["cached_tokens"]
    )
    assert more("gptoss_time_to_first_token_seconds_count") == 1
    assert more("gptoss_inter_token_latency_seconds_count") == 19
    assert more("gptoss_e2e_request_latency_seconds_count") == 1
    assert more('gptoss_request_success_total{finished_reason="length"}') == 1
    assert after["gptoss_num_requests_running"] == after["gptoss_num_requests_waiting"] == "0.0"
    assert 0 < float(after["gptoss_kv_cache_usage_perc"]) <= 1


def test_the_models_and_the_state(server, client):
    assert [m.id for m in client.models.list()] == ["org/nano"]
    assert client.models.retrieve("org/nano").id == "org/nano"
    with server.client() as raw:
        assert raw.get("/ready").json() == raw.get("/health").json() == {"status": "ok"}
        given = raw.get("/health", headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        forged = raw.get("/health", headers={"x-request-id": 'a" b'})
        assert forged.headers["x-request-id"].startswith("req_")


def test_the_log_is_json_and_keeps_secrets(server, caplog):
    secret = "xylophone"

    def logged(answer):
        """Its line, which may come after it; there may be lines of what was before, too."""
        id, found = answer.headers["x-request-id"], []
        until(lambda: found.extend(r for r in caplog.records if r.fields.get("id") == id) or found)
        return json.loads(Lines().format(found[0]))

    with caplog.at_level(logging.INFO, "gptoss.server"):
        done = logged(server.chat([{"role": "user", "content": secret}], max_tokens=2))
        bad = logged(server.chat([{"role": "user", "content": 5, "name": secret}]))
    assert done["event"] == bad["event"] == "request"
    assert done["status"] == 200 and done["id"] and done["seconds"] > 0
    assert done["usage"]["completion"] == 2 and done["finish"] == ["length"]
    assert bad["status"] == 400
    assert secret not in json.dumps([done, bad])


def test_a_failure_inside_is_told_without_its_words(server, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("the secret of /etc/passwd")

    monkeypatch.setattr("gptoss.server.chat.as_conversation", broken)
    response = server.chat()
    monkeypatch.undo()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    until(lambda: len(caplog.records))  # the client may know before the log does
    logged = "".join(Lines().format(record) for record in caplog.records)
    assert "RuntimeError" in logged and response.headers["x-request-id"] in logged
    assert "passwd" not in response.text + logged
    assert server.chat(max_tokens=1).status_code == 200


def test_a_failing_step_ends_its_requests_and_no_others(server, monkeypatch):
    engine = server.served.worker.engine

    def broken(*_, **__):
        raise RuntimeError("the backend's secret")

    monkeypatch.setattr(engine.backend, "forward", broken)
    whole = server.chat()
    streamed = server.chat(stream=True)
    monkeypatch.undo()
    assert whole.status_code == 500
    last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert "secret" not in whole.text + streamed.text
    assert server.chat(max_tokens=1).status_code == 200


def test_at_the_end_requests_may_finish():
    with running(grace=90) as server, server.client() as client:
        body = {"messages": QUESTION, "stream": True, "ignore_eos": True, "max_tokens": 500}
        with client.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            with server.slowly():
                next(lines)
                server.server.should_exit = True
                until(lambda: server.server.gate.draining)
                assert server.busy
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(server.base + "/health")


def test_what_takes_too_long_at_the_end_is_told_so():
    with running(grace=0.2) as server, server.slowly(), server.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.should_exit = True
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_the_command_serves_on_a_free_port():
    command = [sys.executable, "-m", "gptoss.cli", "serve", "--port", "0", "--grace", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
        address = up.stdout.readline().strip()
        with httpx2.Client(base_url=address, timeout=120) as client:
            assert client.get("/models").json()["data"][0]["id"] == "nano"
            body = {"messages": QUESTION, "stream": True, "max_tokens": 3}
            assert len(events(client.post("/chat/completions", json=body))) > 1
        up.send_signal(2)
        _, told = up.communicate(timeout=120)
    assert up.returncode == 130
    assert "memory:" in told and '"event": "ready"' in told and '"event": "stopped"' in told


def test_a_port_that_is_taken_is_said_before_loading(server):
    port = server.base.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "gptoss.cli", "serve", "--port", port]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "already in use" in ran.stderr and "memory" not in ran.stderr


def test_without_its_libraries_the_command_says_what_to_install():
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastapi", "uvicorn", "prometheus_client", "pydantic"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["gptoss", "serve"]
from gptoss.cli.main import main
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and "pip install 'gptoss[serve]'" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "examples, cases, checks",
    [
        # what a document cannot say: that an id exists, that fields fit each other
        (20, 150, ("--exclude-checks", "positive_data_acceptance")),
        # of very many, some that it takes for wrong are right; no server error is
        (700, 5000, ("--checks", "not_a_server_error")),
    ],
)
def test_the_document_is_true(examples, cases, checks):
    """schemathesis asks what the OpenAPI document allows, and what it does not."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run"),
        *("--seed", "1", "--max-examples", str(examples), "--request-timeout", "300"),
        *("--suppress-health-check", "filter_too_much"),  # few texts are a path
        *("--phases", "examples,fuzzing", "--generation-database", "none"),
        *checks,
    ]
    with running(timeout=0.1) as server:
        ran = subprocess.run(
            [*command, f"{server.base}/openapi.json"], capture_output=True, text=True
        )
        assert server.idle()
    assert ran.returncode == 0, ran.stdout[-8000:]
    assert int(re.search(r"(\d+) generated", ran.stdout)[1]) >= cases
