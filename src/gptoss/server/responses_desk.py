"""Where responses are asked for, looked up, stopped and thrown away."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gptoss.server.errors import ApiError, refused, refusing
from gptoss.server.logs import note
from gptoss.server.loop import Loop, answer
from gptoss.server.messages import MOST_MESSAGES
from gptoss.server.responses_body import ResponseRequest
from gptoss.server.responses_document import document
from gptoss.server.responses_items import new_id
from gptoss.server.responses_job import Job
from gptoss.server.responses_output import Output
from gptoss.server.served import Served
from gptoss.server.store import Record, Store
from gptoss.server.turn import Ask, Turn
from gptoss.text import harmony
from gptoss.text.messages import Message

ENDED, EVENTS = 1024, 16 << 20  # background streams that are over, and bytes of their events
STORING = 10.0  # seconds for what the engine left to be stored, when it has stopped
OURS = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}
Items = list[dict[str, Any]]


class Desk:
    """All responses of a server: those in the making, and those in its store."""

    def __init__(self, served: Served, store: Store) -> None:
        self.served, self.store = served, store
        self._jobs: dict[str, Job] = {}
        self._ended: OrderedDict[str, Job] = OrderedDict()  # events to read again; what was lost

    async def open(self, body: ResponseRequest) -> Job:
        """Begin a response. Raises ApiError: what is asked cannot be, or too many wait."""
        body.check()
        history = await self._history(body.previous_response_id)
        given = await self._given(body.items(), history)
        if not history and not given:
            raise refused("input: there is nothing to answer", "input")
        with refusing():
            ask = body.ask([*history, *given], self.served)
        said = document(body, new_id("resp"), self.served)
        turn = await self._begin(ask, body)
        job = Job(
            said,
            given,
            turn,
            Output(self.served.tokenizer, logprobs=body.logprobs, seal=body.sealed),
            store=self.store if said["store"] else None,
            streams=bool(body.stream),
            over=self._over,
        )
        try:
            if body.background:
                await self.store.put(Record(said, given))
        except BaseException:
            job.stop()
            raise
        self._jobs[job.id] = job
        job.start()
        return job

    async def find(self, id: str) -> dict[str, Any]:
        """The response object. Raises ApiError."""
        return (await self._found(id)).response

    async def input_items(self, id: str) -> Items:
        """All that led to a response, the oldest first. Raises ApiError."""
        found = await self._found(id)
        try:
            before = await self._history(found.response["previous_response_id"])
        except ApiError:  # what went before was deleted since
            before = []
        return [*before, *found.input]

    def running(self, id: str) -> Job:
        """A background stream that is going on or was until lately. Raises ApiError."""
        job = self._jobs.get(id) or self._ended.get(id)
        if job is None or not (job.background and job.streams):
            raise refused(
                "stream: events are kept of responses with background and stream only, and not "
                "long after their end; ask without stream",
                "stream",
            )
        return job

    async def cancel(self, id: str) -> dict[str, Any]:
        """The response object, when it is over. Raises ApiError."""
        if not (await self.find(id))["background"]:
            raise refused("only a response with background: true can be cancelled")
        if job := self._jobs.get(id):
            job.stop()
            await job.over.wait()
        return await self.find(id)

    async def delete(self, id: str) -> None:
        """Stop it and forget it. Raises ApiError."""
        job = self._jobs.get(id)
        if job is not None and job.store is not None:
            job.stop()
            await job.over.wait()
        self._ended.pop(id, None)
        if not await self.store.delete(id):
            raise missing(id)

    async def close(self) -> None:
        """When the engine has stopped: wait for what it leaves to be stored."""
        ends = [asyncio.ensure_future(job.over.wait()) for job in self._jobs.values()]
        if ends:
            await asyncio.wait(ends, timeout=STORING)
        await self.store.close()

    async def _found(self, id: str) -> Record:
        job = self._jobs.get(id) or self._ended.get(id)
        if job is not None and job.store is not None:
            return Record(job.document, job.given)
        found = await self.store.get(id)
        if found is None:
            raise missing(id)
        return found

    async def _history(self, id: str | None) -> Items:
        """Items of a response and all before it, the oldest first. Raises ApiError."""
        parts: list[Items] = []
        while id is not None:
            if id in self._jobs:
                raise _unusable(id, "is not over yet")
            found = await self.store.get(id)
            if found is None:
                raise _unusable(id, "does not exist, or no longer")
            parts.append([item for item in found.items if not _cut(item)])
            if sum(map(len, parts)) > MOST_MESSAGES:
                raise _unusable(id, f"and those before have more than {MOST_MESSAGES} items")
            id = found.response["previous_response_id"]
        return [item for part in reversed(parts) for item in part]

    async def _given(self, items: Items, history: Items) -> Items:
        """The input with its references replaced, without what is in the history."""
        known = {item["id"]: item for item in history}
        given: Items = []
        for item in items:
            if item["type"] == "item_reference":
                found = known.get(item["id"]) or await self.store.item(item["id"])
                if found is None:
                    raise refused(f"input: there is no item {item['id'][:80]!r}", "input")
                item = found
            if item["id"] not in known:
                known[item["id"]] = item
                given.append(item)
            elif known[item["id"]] != item:
                raise refused(f"input: two items have the id {item['id'][:80]!r}", "input")
        return given

    async def _begin(self, ask: Ask, body: ResponseRequest) -> Turn | Loop:
        try:
            return await answer(self.served, ask)
        except ApiError as error:
            if error.code != "context_length_exceeded" or body.truncation != "auto":
                raise _ours(error) from None
        room = self.served.context - min(body.max_output_tokens or 4096, self.served.context // 4)
        shorter = await asyncio.to_thread(shortened, ask.messages, self.served, room)
        try:
            return await answer(self.served, replace(ask, messages=shorter))
        except ApiError as error:
            raise _ours(error) from None

    def _over(self, job: Job) -> None:
        self._jobs.pop(job.id)
        if job.background:
            note("response", {name: job.document[name] for name in ("id", "status", "usage")})
        if job.background and (job.streams or job.lost):
            self._ended[job.id] = job
            while len(self._ended) > ENDED or sum(j.size for j in self._ended.values()) > EVENTS:
                self._ended.popitem(last=False)


def shortened(messages: Sequence[Message], served: Served, room: int) -> list[Message]:
    """The conversation without its oldest messages, so that it takes at most ``room`` tokens.

    What system and developer say at the front stays, and so does the last message.
    """
    sizes = [len(harmony.render([m], served.tokenizer, keep_analysis=True)) for m in messages]
    front = next(
        (i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages)
    )
    last, spent = front, sum(sizes) + 8  # with the opening of the turn
    while spent > room and last < len(messages) - 1:
        spent -= sizes[last]
        last += 1
    while last < len(messages) - 1 and messages[last].role == "tool":  # of a call that is gone
        last += 1
    return [*messages[:front], *messages[last:]]


def missing(id: str) -> ApiError:
    """There is no such response."""
    return ApiError(404, f"there is no response {id[:80]!r}", param="response_id")


def _cut(item: dict[str, Any]) -> bool:
    """A call that was never complete: nobody has run it."""
    return bool(item["type"] == "function_call" and item["status"] == "incomplete")


def _unusable(id: str, why: str) -> ApiError:
    return ApiError(
        400,
        f"previous_response_id: the response {id[:80]!r} {why}",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def _ours(error: ApiError) -> ApiError:
    """In the words of this API."""
    if error.param not in OURS:
        return error
    theirs, ours = error.param, OURS[error.param]
    return ApiError(
        error.status,
        error.message.replace(theirs, ours, 1),
        type=error.type,
        param=ours,
        code=error.code,
        headers=error.headers,
    )
