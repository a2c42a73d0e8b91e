"""Crowds: what each says is what it says alone, nothing stays behind, nobody is kept out."""

import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.server.conftest import QUESTION
from tests.server.soak import soak
from tests.server.test_responses_store import Process


def test_a_brief_soak_leaves_nothing_behind():
    facts, wrong = soak(streams_=12, seconds=60, requests=60)
    assert not wrong, wrong
    assert facts["answered"] + facts["dropped"] == facts["asked"] >= 60, facts
    assert facts["answered"] > 30 and facts["dropped"], "else little was tried"
    assert not any(facts["left"].values()), facts


@pytest.mark.slow
def test_64_streams_for_five_minutes_leave_nothing_behind_and_memory_flat():
    facts, wrong = soak(streams_=64, seconds=300)
    assert not wrong, wrong
    assert facts["answered"] + facts["dropped"] == facts["asked"], facts
    assert not any(facts["left"].values()), facts
    _, warm, end = facts["megabytes"]
    assert end < warm + 32, facts


@pytest.mark.slow
def test_thousands_of_slow_clients_keep_nobody_out(tmp_path):
    """More than there may be connections, each with a byte now and then, in a header or a body."""
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("this system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    up = Process(tmp_path / "responses.db")
    with up as client, ExitStack() as stack:
        address = (client.base_url.host, client.base_url.port)
        question = {"messages": QUESTION, "max_tokens": 5}
        assert client.post("/chat/completions", json=question).status_code == 200
        before = megabytes(up.process.pid)
        header = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999\r\n"
        raws = []
        for i in range(2500):
            raws.append(stack.enter_context(socket.create_connection(address, timeout=60)))
            raws[-1].setblocking(False)
            send(raws[-1], header + b"\r\n{" * (i % 2))
        for _ in range(20):
            for raw in raws:
                send(raw, b"x")
            answer = client.post("/chat/completions", json=question)
            assert answer.status_code == 200, answer.text
        assert client.get("/models").status_code == 200
        assert megabytes(up.process.pid) < before + 200


def send(raw, data):
    with suppress(OSError):  # whoever was hung up on
        raw.send(data)


def megabytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
