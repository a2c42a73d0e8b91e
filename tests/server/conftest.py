"""A real server on loopback, started once: the packaged model behind uvicorn in a thread."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx2
import openai
import pytest

from gptoss import LLM
from gptoss.server.run import Server, serve_model, take_port, url

QUESTION = [{"role": "user", "content": "What is 12+30?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
LONG = 120  # seconds that nothing here should ever need
ASKING = [{"role": "user", "content": "What is the weather in Paris?"}]


class Running:
    """A server and ways to talk to it."""

    def __init__(self, server, address):
        self.server, self.served, self.url = server, server.served, address
        self.base = address.removesuffix("/v1")

    def client(self, **more):
        return httpx2.Client(base_url=self.base, timeout=LONG, **more)

    def connect(self):
        host, port = self.base.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=LONG)

    def post(self, path, body, **more):
        with self.client() as client:
            return client.post(path, json=body, **more)

    def chat(self, messages=QUESTION, **more):
        body = {"messages": messages, "temperature": 0, "reasoning_effort": "low"} | more
        return self.post("/v1/chat/completions", body)

    @property
    def busy(self):
        stats = self.served.worker.stats
        return stats.running + stats.waiting

    def idle(self, seconds=30):
        """Wait until nothing runs; False if something still does."""
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end:
            time.sleep(0.005)
        return not self.busy

    def leave(self, path, body):
        """Ask, and hang up once the engine is at it."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {self.base.removeprefix('http://')}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        with self.connect() as raw:
            raw.sendall(head.encode() + data)
            until(lambda: self.busy)

    @contextmanager
    def slowly(self):
        """No token takes less than 50 ms: whoever asks for 1,500 is not done in a minute, however
        long this thread is kept waiting meanwhile."""
        backend = self.served.worker.engine.backend
        forward = backend.forward

        def slow(batch, cache, trace=None):
            time.sleep(0.05 * len(batch.wanted))
            return forward(batch, cache, trace)

        backend.forward = slow
        try:
            yield
        finally:
            backend.forward = forward

    def count_steps(self):
        """From now on a request's seconds are steps of the engine."""
        engine = self.served.worker.engine
        engine.clock = lambda: engine.steps


def until(come):
    end = time.monotonic() + LONG
    while not come():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def running(grace=5.0, waiting=64, timeout=None, llm=None, tools=None, **more):
    llm = llm or LLM.load("nano")
    served = serve_model(llm, "org/nano", waiting=waiting, timeout=timeout, tools=tools)
    taken = take_port("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(served, grace=grace, ready=ready.set, **more)
    thread = threading.Thread(target=server.run, args=([taken],))
    thread.start()
    try:
        assert ready.wait(LONG)
        yield Running(server, url(taken))
    finally:
        server.should_exit = True
        thread.join(LONG)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server():
    with running() as up:
        yield up


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def events(response):
    """The data of a stream's events, in order; the last must be [DONE]."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    data = [b.removeprefix("data: ") for b in blocks if not b.startswith(":")]
    assert data.pop() == "[DONE]"
    return [json.loads(d) for d in data]
