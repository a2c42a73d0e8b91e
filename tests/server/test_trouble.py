"""Whatever arrives, the answer is a precise error in one form, and the next request is served."""

import json
from contextlib import ExitStack, suppress

import pytest

from gptoss.server.connection import LARGEST_HEADER
from tests.server.conftest import QUESTION, WEATHER, running, until

CHAT = "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}


def tool(**more):
    return {"type": "function", "function": WEATHER["function"] | more}


def deep(levels):
    inner = {}
    for _ in range(levels):
        inner = {"items": inner}
    return inner


@pytest.fixture(autouse=True)
def unharmed(server):
    yield
    assert server.chat(max_tokens=1).status_code == 200
    assert server.idle()


def refused(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) <= 500
    assert "/src/" not in error["message"] and "0x" not in error["message"]
    return error


@pytest.mark.parametrize(
    "more, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "name": "a b"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": "x", "name": "a\n<|end|>"}]},
            "messages[0].name",
        ),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "nix"}]},
            "messages[0].tool_call_id",
        ),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
        ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool(), tool()]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [tool(parameters=deep(100))]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "nix"}}, "tools": [tool()]},
            "tool_choice",
        ),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, None),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, None),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nix"}},
                }
            },
            None,
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": deep(500)},
                }
            },
            None,
        ),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"guided_json": {}} | {"guided_regex": "a*"}, "guided_regex"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_a_request_that_cannot_be_names_its_field(server, more, param):
    error = refused(server.chat(**({"messages": QUESTION} | more)))
    if param is not None:
        assert error["param"] == param, error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_request(server, body):
    with server.client() as client:
        refused(client.post(CHAT, content=body, headers={"content-type": "application/json"}))


def test_half_a_surrogate_is_text(server):
    """UTF-8 cannot express it; the tokenizer makes it U+FFFD."""
    body = b'{"messages": [{"role": "user", "content": "a \\ud800 b"}], "max_tokens": 2, "n": 2}'
    with server.client() as client:
        headers = {"content-type": "application/json"}
        assert client.post(CHAT, content=body, headers=headers).status_code == 200
        refused(
            client.post(
                CHAT,
                content=body.replace(b"a ", b"").replace(b'"n": 2', b'"n": "\\ud800"'),
                headers=headers,
            )
        )


def test_a_body_must_say_that_it_is_json(server):
    """A web page cannot send that without being allowed to."""
    with server.client() as client:
        body = json.dumps({"messages": QUESTION})
        error = refused(client.post(CHAT, content=body, headers={"content-type": "text/plain"}))
        assert "content-type" in error["message"]


def test_a_huge_body_is_not_read(server):
    with server.client() as client:
        refused(client.post(CHAT, content=b" " * (9 << 20)), 413)

        def dripping():
            for _ in range(9):
                yield b" " * (1 << 20)

        refused(client.post(CHAT, content=dripping()), 413)


def test_a_prompt_longer_than_the_room(server):
    error = refused(server.chat([{"role": "user", "content": "word " * 5000}]))
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_prompt_far_too_long_is_not_tokenized(server, monkeypatch, role):
    tokenizer = type(server.served.tokenizer)
    encode = tokenizer.encode

    def short(self, text):
        assert len(text) < 1 << 20
        return encode(self, text)

    monkeypatch.setattr(tokenizer, "encode", short)
    turns = [{"role": role, "content": "7" * (7 << 20)}, {"role": "user", "content": "Hi."}]
    error = refused(server.chat(turns))
    assert error["code"] == "context_length_exceeded" and "characters" in error["message"]
    with server.client() as client:
        error = refused(client.post("/v1/completions", json={"prompt": "7" * (7 << 20)}))
    assert error["code"] == "context_length_exceeded"


def test_paths_and_methods(server):
    with server.client() as client:
        refused(client.get("/nix"), 404)
        refused(client.get("/v1/models/nix"), 404)
        refused(client.delete("/v1/models"), 405)
        assert client.get(CHAT).headers["allow"] == "POST"
        error = refused(server.chat(model="gpt-5"), 404)
        assert error["code"] == "model_not_found" and "org/nano" in error["message"]


def test_what_is_ignored_is_named(server):
    response = server.chat(max_tokens=1, temprature=1, store=True, chat_template_kwargs=None)
    assert response.status_code == 200
    assert response.headers["x-gptoss-ignored"] == "temprature,store,chat_template_kwargs"


def test_header_lines_without_end(server):
    with server.connect() as raw:
        begun = b"GET / HTTP/1.1\r\nx: "
        raw.sendall(begun + b"y" * (LARGEST_HEADER + 1 - len(begun)))
        told(raw, 400)


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS, to where there is none
        b"GET / HTTP/1.1\r\n\r\n",  # without a host
        b"GET / HTTP/1.1\r\nhost: localhost\r\na b: c\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n"
        b"content-length: 2\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nno\r\n",
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 6000)[: LARGEST_HEADER + 1],
    ],
)
def test_what_is_no_http_is_told_so_in_the_one_form(server, sent):
    with server.connect() as raw:
        raw.sendall(sent)
        told(raw, 400)


def told(raw, status):
    """The answer to raw bytes is an error in the one form, and the end."""
    head, _, body = b"".join(iter(lambda: raw.recv(1 << 16), b"")).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), head
    assert b"content-type: application/json" in head.lower()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_page_that_calls_itself_by_this_address_is_refused(server):
    """DNS rebinding: its own name, and the server's address behind it."""
    with server.client() as client:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[evil]", ""):
            error = refused(client.get("/v1/models", headers={"host": host}), 403)
            assert error["code"] == "host_not_allowed", host
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:80", "a.localhost:1"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200, host


def test_who_asks_for_a_key_may_have_any_name():
    with running(keys=["k"]) as server, server.client() as client:
        how = {"host": "models.example", "authorization": "Bearer k"}
        assert client.get("/v1/models", headers=how).status_code == 200


def test_slow_headers_are_hung_up_on(server, monkeypatch):
    from gptoss.server import connection

    monkeypatch.setattr(connection, "HEADERS_WITHIN", 0.2)
    with server.connect() as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n")
        assert raw.recv(100) == b""


def test_where_there_are_too_many_connections_the_idlest_goes(server, monkeypatch):
    from gptoss.server import connection

    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 8)
    begun = [b"", b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"]
    begun.append(begun[-1] + b"content-length: 10\r\n\r\n{")
    with ExitStack() as stack:
        raws = [stack.enter_context(server.connect()) for _ in range(20)]
        for i, raw in enumerate(raws):
            with suppress(ConnectionError):
                raw.sendall(begun[i % 4])
        with server.slowly():  # whom the engine works for is not hung up on
            body = json.dumps({"prompt": "a", "max_tokens": 8, "ignore_eos": True}).encode()
            busy = stack.enter_context(server.connect())
            head = begun[2] + b"content-type: application/json\r\nconnection: close\r\n"
            busy.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            until(lambda: server.busy)
            raws += [stack.enter_context(server.connect()) for _ in range(20)]
            assert b" 200 " in b"".join(iter(lambda: busy.recv(1 << 16), b""))
        assert server.chat(max_tokens=1).status_code == 200
        assert len(server.server.server_state.connections) <= 9


def test_bodies_have_a_bound_together(server, monkeypatch):
    from gptoss.server import gate

    monkeypatch.setattr(gate, "TOGETHER", 1 << 20)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 900000\r\n\r\n"
    with server.connect() as slow:
        slow.sendall(head + b" " * 800_000)
        until(lambda: server.server.gate.bytes == 800_000)
        body = json.dumps({"prompt": "x" * 300_000, "max_tokens": 1})
        with server.client() as client:
            how = {"content-type": "application/json"}
            assert refused(client.post("/v1/completions", content=body, headers=how), 429)
    until(lambda: server.server.gate.bytes == 0)


def test_slow_bodies_are_told_so(server, monkeypatch):
    from gptoss.server import gate

    monkeypatch.setattr(gate, "SLOWEST", 0.2)
    with server.connect() as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{"
        )
        assert b" 408 " in raw.recv(100)
