"""The events of a response: each in its place, and together the response itself."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.server.conftest import ASKING, QUESTION, WEATHER, running, until

TOOL = {"type": "function", **WEATHER["function"]}
LAST = {"response.completed", "response.incomplete", "response.failed"}
# Between an item's first event and its last; deltas come behind the first so many of these.
STEPS = {
    "reasoning": ("content_part.added", "reasoning_text.done", "content_part.done"),
    "message": ("content_part.added", "output_text.done", "content_part.done"),
    "function_call": ("function_call_arguments.done",),
}
DELTA = {
    "reasoning": ("reasoning_text.delta", 1),
    "message": ("output_text.delta", 1),
    "function_call": ("function_call_arguments.delta", 0),
}
LONG = {"min_tokens": 1500, "max_output_tokens": 1500}  # slowly, that is more than a minute


def ask(server, input=QUESTION, **more):
    body = {"input": input, "temperature": 0, "reasoning": {"effort": "low"}} | more
    return server.post("/v1/responses", body)


def get(server, path):
    with server.client() as client:
        return client.get(path)


def parse(text):
    """The events of a stream, whose names must be those in their data."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def grammar(events, first=0):
    """Check the order and the sums; the response at the end."""
    assert [e["sequence_number"] for e in events] == list(range(first, first + len(events)))
    names = [e["type"] for e in events]
    assert names[0] == "response.created"
    begun = 3 if names[1] == "response.queued" else 2
    assert names[begun - 1] == "response.in_progress"
    assert names[-1] in LAST and not LAST & set(names[:-1])
    last, done = events[-1]["response"], []
    assert {e["response"]["id"] for e in (*events[:begun], events[-1])} == {last["id"]}
    inner = iter(events[begun:-1])
    for event in inner:
        assert event["type"] == "response.output_item.added", event
        assert event["output_index"] == len(done)
        done.append(item(event["item"], len(done), inner))
    assert done == last["output"]
    return last


def item(added, at, events):
    """One item from its second event on; as it is done."""
    steps, (delta, place) = STEPS[added["type"]], DELTA[added["type"]]
    taken, text, told = 0, "", []
    assert added["id"] and added["status"] == "in_progress"
    for event in events:
        name = event["type"].removeprefix("response.")
        assert event["output_index"] == at
        if name == "output_item.done":
            assert taken == len(steps), f"{name} before {steps[taken]}"
            finished = event["item"]
            assert finished["id"] == added["id"] and finished["type"] == added["type"]
            assert finished["status"] in ("completed", "incomplete")
            assert said(finished) == text
            return finished
        assert event["item_id"] == added["id"]
        assert event.get("content_index") == (None if "arguments" in name else 0)
        if name == delta:
            assert taken == place, f"{name} behind {steps[taken - 1]}"
            text += event["delta"]
            told += event.get("logprobs", [])
            continue
        assert name == steps[taken], f"{name} in place of {steps[taken]}"
        taken += 1
        if "part" in event:
            assert event["part"]["text"] == text
        elif "arguments" in event:
            assert event["arguments"] == text and event["name"] == added["name"]
        else:
            assert event["text"] == text and event.get("logprobs", told) == told
    raise AssertionError("the stream ended inside an item")


def said(item):
    """The text of an item."""
    if item["type"] == "function_call":
        return item["arguments"]
    [part] = item["content"]
    return part["text"]


def unnamed(response):
    """Without what differs each time."""
    plain = json.loads(json.dumps(response))
    for key in ("id", "created_at", "completed_at", "usage"):
        del plain[key]
    for each in plain["output"]:
        del each["id"]
        each.pop("call_id", None)
    return plain


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"input": ASKING, "tools": [TOOL]},
        {"max_output_tokens": 1},
        {"max_output_tokens": 20},
        {"input": ASKING, "tools": [TOOL], "tool_choice": "required", "max_output_tokens": 40},
        {"top_logprobs": 2},
        {"stop": "="},
        {"background": True},
        {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 120},
        {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "medium"}},
    ],
)
def test_events_are_in_order_and_sum_up_to_the_response(server, more):
    response = ask(server, stream=True, **more)
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    streamed = grammar(parse(response.text))
    assert get(server, f"/v1/responses/{streamed['id']}").json() == streamed
    if "background" not in more:
        assert unnamed(ask(server, **more).json()) == unnamed(streamed)


def test_a_cut_answer_is_incomplete_in_all_its_parts(server):
    events = parse(ask(server, stream=True, max_output_tokens=20).text)
    assert events[-1]["type"] == "response.incomplete"
    response = events[-1]["response"]
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"]["output_tokens"] == 20 and response["completed_at"] is None
    assert response["output"][-1]["status"] == "incomplete"


def test_snapshots_on_the_way_are_true(server):
    events = parse(ask(server, stream=True, background=True).text)
    assert [e["response"]["status"] for e in events[:3]] == ["queued", "queued", "in_progress"]
    foreground = parse(ask(server, stream=True).text)
    assert [e["response"]["status"] for e in foreground[:2]] == ["in_progress", "in_progress"]
    for begun in (events[2], foreground[1]):
        assert begun["response"]["output"] == [] and begun["response"]["usage"] is None
        assert begun["response"].keys() == events[-1]["response"].keys()


@contextmanager
def reading(server, **more):
    """The id of a long response whose stream is under way, and is left at the end."""
    body = {"input": QUESTION, "temperature": 0, "stream": True} | LONG | more
    with server.client() as client, client.stream("POST", "/v1/responses", json=body) as response:
        id = None
        for line in response.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                id = id or event["response"]["id"]
                if event["type"].endswith(".delta"):
                    break
        yield id


def test_who_hangs_up_on_a_stream_frees_its_slot(server):
    with server.slowly():
        with reading(server) as id:
            assert server.busy
        assert server.idle()
    found = finished(server, id)
    assert found["status"] == "cancelled" and found["output"], "what there was is kept"
    assert found["output"][-1]["status"] == "incomplete"


def test_who_hangs_up_while_waiting_frees_its_slot(server):
    with server.slowly():
        server.leave("/v1/responses", {"input": "1 + 1"} | LONG)
        assert server.idle()


def finished(server, id):
    """The response when it is over."""
    with server.client() as client:

        def now():
            return client.get(f"/v1/responses/{id}").json()

        until(lambda: now()["status"] not in ("queued", "in_progress"))
        return now()


def test_a_background_response_runs_on_alone_and_can_be_followed_again(server):
    body = {"input": QUESTION, "temperature": 0, "stream": True, "background": True}
    with server.client() as client, client.stream("POST", "/v1/responses", json=body) as response:
        first = next(line for line in response.iter_lines() if line.startswith("data"))
        id = json.loads(first.removeprefix("data: "))["response"]["id"]
    found = finished(server, id)
    assert found["status"] == "completed"
    path = f"/v1/responses/{id}?stream=true"
    whole = parse(get(server, path).text)
    assert grammar(whole) == found
    rest = parse(get(server, f"{path}&starting_after=4").text)
    assert rest == whole[5:]


def test_a_running_background_response_is_followed_to_its_end(server):
    with reading(server, background=True, min_tokens=200, max_output_tokens=200) as id:
        pass
    last = grammar(parse(get(server, f"/v1/responses/{id}?stream=true").text))
    assert last["status"] == "incomplete" and last["usage"]["output_tokens"] == 200


def test_a_background_response_shows_its_progress_and_can_be_cancelled(server):
    with server.slowly(), server.client() as client:
        begun = ask(server, background=True, **LONG).json()
        assert begun["status"] == "queued" and begun["output"] == []
        path = f"/v1/responses/{begun['id']}"
        until(lambda: client.get(path).json()["output"])
        now = client.get(path).json()
        assert now["status"] == "in_progress" and now["output"][-1]["status"] == "in_progress"
        follow = ask(server, "and then?", previous_response_id=begun["id"])
        assert follow.status_code == 400 and "not over yet" in follow.json()["error"]["message"]
        cancelled = client.post(f"{path}/cancel").json()
        assert cancelled["status"] == "cancelled" and cancelled["id"] == begun["id"]
        assert cancelled["error"] is None and cancelled["incomplete_details"] is None
        assert server.idle(), "it goes on"
        assert cancelled["usage"]["output_tokens"] < 1500
        assert client.get(path).json() == client.post(f"{path}/cancel").json() == cancelled


def test_who_follows_is_told_of_a_cancellation(server):
    with server.slowly(), ThreadPoolExecutor(1) as other:
        with reading(server, background=True) as id:
            follower = other.submit(get, server, f"/v1/responses/{id}?stream=true")
            server.post(f"/v1/responses/{id}/cancel", {})
        events = parse(follower.result(120).text)
    assert grammar(events)["status"] == "cancelled"
    assert events[-1]["type"] == "response.incomplete", "clients know no other name for it"


def test_only_background_responses_can_be_cancelled(server):
    id = ask(server, max_output_tokens=1).json()["id"]
    refused = server.post(f"/v1/responses/{id}/cancel", {})
    assert refused.status_code == 400 and "background" in refused.json()["error"]["message"]
    again = get(server, f"/v1/responses/{id}?stream=true")
    assert again.status_code == 400 and again.json()["error"]["param"] == "stream"


def test_deleting_stops_what_runs(server):
    with server.slowly(), server.client() as client:
        id = ask(server, background=True, **LONG).json()["id"]
        assert client.delete(f"/v1/responses/{id}").json()["deleted"] is True
        assert server.idle()
        assert client.get(f"/v1/responses/{id}").status_code == 404


def test_what_takes_longer_than_a_request_may_has_failed_and_keeps_what_it_has():
    with running(timeout=50) as up:
        up.count_steps()
        whole = ask(up, **LONG).json()
        last = grammar(parse(ask(up, stream=True, **LONG).text))
    for response in (whole, last):
        assert response["status"] == "failed" and "longer" in response["error"]["message"]
        assert response["incomplete_details"] is None and response["completed_at"] is None
        assert 0 < response["usage"]["output_tokens"] < 1500
