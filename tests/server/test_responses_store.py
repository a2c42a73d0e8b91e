"""What was acknowledged is there: after kill -9, too; and memory has a bound."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys

import httpx2
import pytest

from gptoss.errors import GptOssError
from gptoss.server.store import Record, Store
from tests.server.conftest import running, until
from tests.server.test_responses_stream import finished


def record(id, status="completed", text="x", previous=None):
    item = {"type": "message", "id": f"msg_{id}", "role": "user", "status": "completed"}
    item["content"] = [{"type": "input_text", "text": text}]
    response = {"id": id, "status": status, "output": [], "previous_response_id": previous}
    return Record(response | {"error": None}, [item])


def using(store, job):
    """Run ``await job(store)`` and close it."""

    async def main():
        try:
            return await job(store)
        finally:
            await store.close()

    return asyncio.run(main())


def test_what_was_put_is_there_after_opening_again(tmp_path):
    path = tmp_path / "responses.db"

    async def write(store):
        for text in ("first", "a \ud800 \0 \u2028"):
            await store.put(record("resp_1", text=text))
        await store.put(record("resp_2", status="in_progress"))
        await store.put(record("resp_2", status="completed"))
        await store.put(record("resp_3", status="queued"))

    async def read(store):
        return [await store.get(f"resp_{i}") for i in (1, 2, 3, 4)]

    using(Store(path), write)
    one, two, three, four = using(Store(path), read)
    assert one == record("resp_1", text="first"), "an input does not change"
    assert two == record("resp_2") and four is None
    assert three.response["status"] == "failed", "its server is gone"
    assert three.response["error"]["code"] == "server_error"
    assert oct(path.stat().st_mode)[-3:] == "600"


def test_items_are_found_and_forgotten(tmp_path):
    async def main(store):
        await store.put(record("resp_1"))
        await store.put(Record(record("resp_2").response, record("resp_1").input))
        assert (await store.item("msg_resp_1"))["id"] == "msg_resp_1"
        assert await store.item("msg_resp_2") is None
        assert await store.delete("resp_2") and not await store.delete("resp_2")
        assert await store.item("msg_resp_1"), "another response has it"
        assert await store.delete("resp_1")
        assert await store.item("msg_resp_1") is None

    using(Store(tmp_path / "responses.db"), main)


@pytest.mark.parametrize("bound", [{"most": 3}, {"characters": 800}])
def test_memory_drops_the_oldest(bound):
    async def main(store):
        for i in range(9):
            await store.put(record(f"resp_{i}", text="x" * 40))
        await store.put(record("resp_8", text="y" * 40))
        left = [i for i in range(9) if await store.get(f"resp_{i}")]
        items = [i for i in range(9) if await store.item(f"msg_resp_{i}")]
        assert left == items == list(range(9))[-len(left) :] and 2 <= len(left) <= 3
        await store.put(record("resp_big", text="x" * 5000))
        assert await store.get("resp_big"), "the newest is never dropped"

    using(Store(**bound), main)


def test_a_file_does_not_forget(tmp_path):
    async def main(store):
        for i in range(9):
            await store.put(record(f"resp_{i}"))
        assert await store.get("resp_0")

    using(Store(tmp_path / "responses.db", most=3), main)


def test_a_file_belongs_to_one_server(tmp_path):
    store = Store(tmp_path / "responses.db")
    with pytest.raises(GptOssError, match="another server"):
        Store(tmp_path / "responses.db")
    asyncio.run(store.close())
    asyncio.run(Store(tmp_path / "responses.db").close())


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    foreign, text = tmp_path / "foreign.db", tmp_path / "notes.txt"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE mine (a)")
    db.close()
    text.write_text("not a database, and longer than a header of one would be " * 9)
    before = foreign.read_bytes(), text.read_bytes()
    for path in (foreign, text, tmp_path / "no" / "folder.db"):
        with pytest.raises(GptOssError, match=path.name):
            Store(path)
    assert (foreign.read_bytes(), text.read_bytes()) == before


class Process:
    """``gptoss serve --store``, to be killed."""

    def __init__(self, path):
        command = [
            sys.executable,
            "-m",
            "gptoss.cli",
            "serve",
            "nano",
            "--port",
            "0",
            "--conversations",
            "1",
        ]
        self.process = subprocess.Popen(
            [*command, "--store", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        url = self.process.stdout.readline().strip()
        assert url.startswith("http://"), "it did not start"
        self.client = httpx2.Client(base_url=url, timeout=120)

    def __enter__(self):
        return self.client

    def __exit__(self, *_):
        self.client.close()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "responses.db"
    how = {"temperature": 0, "max_output_tokens": 60}
    with Process(path) as client:
        told = [client.post("/responses", json={"input": f"{i}+1", **how}).json() for i in range(3)]
        body = {"input": "9+9", "stream": True, **how}
        with client.stream("POST", "/responses", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if event["type"] in ("response.completed", "response.incomplete"):
                        break
        told.append(event["response"])
        long = {"min_tokens": 1500, "max_output_tokens": 1500}
        for _ in range(12):  # one after the other, so the last cannot be over in the meantime
            cut = client.post("/responses", json={"input": "1", "background": True, **long}).json()
    with Process(path) as client:
        for response in told:
            assert client.get(f"/responses/{response['id']}").json() == response
        found = client.get(f"/responses/{cut['id']}").json()
        assert found["status"] == "failed" and "stopped" in found["error"]["message"]
        follow = {"input": "and then?", "previous_response_id": told[-1]["id"], **how}
        assert client.post("/responses", json=follow).status_code == 200
        items = client.get(f"/responses/{told[-1]['id']}/input_items").json()
        assert [item["content"][0]["text"] for item in items["data"]] == ["9+9"]


def test_what_cannot_be_stored_is_not_acknowledged(server, monkeypatch):
    async def full(record):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(server.server.desk.store, "put", full)
    body = {"input": "1+1", "max_output_tokens": 1}
    answer = server.post("/v1/responses", body)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "disk" not in answer.text and "could not be stored" in answer.text
    streamed = server.post("/v1/responses", body | {"stream": True}).text
    assert "event: response.failed" in streamed and "response.completed" not in streamed
    assert server.post("/v1/responses", body | {"background": True}).status_code == 500
    assert server.post("/v1/responses", body | {"store": False}).status_code == 200
    assert server.idle()


def test_a_background_response_that_is_lost_says_so(server, monkeypatch):
    store = server.server.desk.store
    put, times = store.put, []

    async def full(record):
        times.append(record)
        if len(times) > 1:
            raise sqlite3.OperationalError("database or disk is full")
        await put(record)

    monkeypatch.setattr(store, "put", full)
    body = {"input": "1+1", "max_output_tokens": 1, "background": True}
    found = finished(server, server.post("/v1/responses", body).json()["id"])
    assert found["status"] == "failed" and "could not be stored" in found["error"]["message"]


def test_a_server_that_stops_stores_what_it_leaves(tmp_path):
    path = tmp_path / "responses.db"
    with running(grace=0.3, store=Store(path)) as up, up.slowly(), up.client() as client:
        body = {"input": "1", "background": True, "min_tokens": 1500, "max_output_tokens": 1500}
        slow = client.post("/v1/responses", json=body).json()["id"]
        until(lambda: client.get(f"/v1/responses/{slow}").json()["output"])
        up.server.should_exit = True
        until(lambda: not up.served.worker.alive)

    async def read(store):
        return (await store.get(slow)).response

    left = using(Store(path), read)
    assert left["status"] == "failed" and "shutting down" in left["error"]["message"]
    assert left["output"], "what there was is kept"
