"""What cannot be meant so is refused, in OpenAI's form, with the field and a way out."""

import pytest

from gptoss.errors import Overloaded
from tests.server.conftest import QUESTION, WEATHER
from tests.server.test_responses_stream import ask

TOOL = {"type": "function", **WEATHER["function"]}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
DEEP = {"type": "object"}
for _ in range(200):
    DEEP = {"type": "object", "properties": {"a": DEEP}}

REFUSED = [
    ({"input": None}, "input", "is needed"),
    ({"input": []}, "input", "nothing to answer"),
    ({"input": 5}, "input", "a string or a list"),
    ({"input": ["x"]}, "input[0]", "type must be one of"),
    ({"input": [{"type": "image_generation_call"}]}, "input[0]", "type must be one of"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "assistant"),
    ({"input": [{"role": "user"}]}, "input[0].content", "required"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "a string or a list"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
        "not 'input_image'",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0]",
        "needs its text",
    ),
    ({"input": [CALL | {"name": "a b"}]}, "input[0].name", "letters"),
    ({"input": [{k: CALL[k] for k in ("type", "call_id", "name")}]}, "input[0].arguments", "req"),
    (
        {"input": [{"type": "function_call_output", "call_id": "zz", "output": "x"}]},
        "input",
        "no call before its output has the call_id 'zz'",
    ),
    ({"input": [{"type": "item_reference", "id": "msg_9"}]}, "input", "no item 'msg_9'"),
    ({"input": [{"role": "user", "content": c, "id": "a"} for c in "xy"]}, "input", "id 'a'"),
    ({"instructions": 5}, "instructions", "string"),
    ({"previous_response_id": "resp_9"}, "previous_response_id", "does not exist"),
    ({"model": "gpt-9"}, "model", "does not exist"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"top_logprobs": 21}, "top_logprobs", "20"),
    ({"include": ["secrets"]}, "include[0]", "Input should be"),
    ({"reasoning": {"effort": "extreme"}}, "reasoning.effort", "'low', 'medium' or 'high'"),
    ({"truncation": "some"}, "truncation", "'auto' or 'disabled'"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"background": True, "store": False}, "background", "must be stored"),
    ({"n": 2}, "n", "one answer"),
    ({"messages": QUESTION}, "messages", "say input"),
    ({"max_tokens": 5}, "max_tokens", "say max_output_tokens"),
    ({"response_format": {"type": "text"}}, "response_format", "say text.format"),
    ({"conversation": "conv_1"}, "conversation", "say previous_response_id"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "say instructions"),
    ({"tools": [{"type": "teleport"}]}, "tools[0].type", "no kind of tool"),
    ({"tools": ["x"]}, "tools[0]", "an object"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
    ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name", "pattern"),
    ({"tools": [TOOL, TOOL]}, "tools", "two have the name"),
    ({"tools": [TOOL | {"parameters": DEEP}]}, "tools[0].parameters", "levels deep"),
    ({"tool_choice": "maybe"}, "tool_choice", "'none', 'auto' or 'required'"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "none of"),
    ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice", "cannot be called here"),
    (
        {
            "tools": [TOOL],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "f"}],
            },
        },
        "tool_choice",
        "there is no tool 'f'",
    ),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "needs a schema"),
    (
        {"text": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        "text.format.name",
        "needs a name",
    ),
    (
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nonsense"}}}},
        "text.format",
        "",
    ),
    ({"text": {"format": {"type": "regex", "pattern": "("}}}, "text.format", ""),
]


@pytest.mark.parametrize(
    "body, param, told", REFUSED, ids=[f"{r[1]}-{i}" for i, r in enumerate(REFUSED)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused(server, body, param, told, stream):
    if "stream" in body and stream:
        pytest.skip("is about stream itself")
    response = ask(server, **{"stream": stream, "input": QUESTION} | body)
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400), error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param and told in error["message"], error
    assert not server.busy


@pytest.mark.parametrize("path", ["", "/input_items", "/cancel"])
def test_what_does_not_exist_is_not_found(server, path):
    with server.client() as client:
        ways = [client.post] if path == "/cancel" else [client.get]
        for way in ways + ([client.delete] if not path else []):
            response = way(f"/v1/responses/resp_9{path}")
            error = response.json()["error"]
            assert response.status_code == 404 and "'resp_9'" in error["message"]
            assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "query, param",
    [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=msg_9", "after")],
)
def test_pages_that_cannot_be(server, query, param):
    id = ask(server, max_output_tokens=1).json()["id"]
    with server.client() as client:
        response = client.get(f"/v1/responses/{id}/input_items?{query}")
    assert response.status_code == 400 and response.json()["error"]["param"] == param


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"background": True}])
def test_when_too_many_wait_nothing_is_begun(server, monkeypatch, more):
    def full(*_):
        raise Overloaded("256 requests wait already")

    monkeypatch.setattr(server.served.worker, "submit", full)
    response = ask(server, **more)
    assert response.status_code == 429 and response.headers["retry-after"]
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
