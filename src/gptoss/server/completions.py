"""``/v1/completions``: raw text or tokens, continued without harmony, also only scored.

Special tokens can be given as ids; in text they are text. ``max_tokens`` 0 with ``echo`` and
``logprobs`` scores a prompt: one token is drawn, because that is how the engine works, and dropped.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from gptoss.engine import Request as EngineRequest
from gptoss.server.errors import ApiError, refused, refusing
from gptoss.server.feed import Feed, Settings
from gptoss.server.gate import tell
from gptoss.server.legacy import Continuation, Fresh
from gptoss.server.schema import EITHER, Drawn, StreamOptions, check_model
from gptoss.server.served import Served
from gptoss.server.speech import usage
from gptoss.server.sse import DONE, EventStream, Whole, event
from gptoss.server.turn import Usage

MOST_PROMPTS = 1024
TOGETHER = 16  # prompts of one request that the engine has at once

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
Batches = Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]


def _kind(value: object) -> str:
    """Which of the four forms a prompt has."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, list):
        return "batches"
    if isinstance(first, str):
        return "text" if isinstance(value, str) else "texts"
    return "tokens"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[Batches, Tag("batches")],
    Discriminator(_kind),
]


class CompletionRequest(Drawn):
    """Prompts to continue."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> Settings:
        """How to draw. Raises ApiError, or ValueError."""
        n = self.n or 1
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens: 0 needs echo: there would be no answer", "max_tokens")
        if self.best_of is not None and self.best_of < n:
            raise refused(f"best_of must be at least n, not {self.best_of}", "best_of")
        search = self.best_of if (self.best_of or n) > n else None
        if self.stream and search:
            raise refused("best_of cannot be streamed: the best is known at the end", "best_of")
        return self.settings(
            max_tokens=max(self.max_tokens, 1) if self.max_tokens is not None else None,
            logprobs=self.logprobs,
            best_of=search,
        )


@dataclass(slots=True)
class Job:
    """One prompt, and what becomes of it."""

    text: str | None  # to echo
    request: EngineRequest
    rows: list[Continuation]
    mute: bool  # the prompt is only scored
    feed: Feed | None = None

    def start(self, feed: Feed) -> Iterator[tuple[int, Fresh]]:
        """Behind the prompt: its echo."""
        if self.text is not None:
            for i, row in enumerate(self.rows):
                yield i, row.echo(self.text, feed.stream.prompt_logprobs, self.request.prompt)
                if self.mute:
                    yield i, row.end("length")

    def end(self, feed: Feed) -> Iterator[tuple[int, Fresh]]:
        """No token follows."""
        for i, row in enumerate(self.rows):
            if not row.over:
                yield i, row.end("stop" if feed.stream.answers[i].finish == "stop" else "length")

    async def run(self, feed: Feed) -> AsyncGenerator[tuple[int, Fresh], None]:
        """What is new, by row."""
        begun = False
        async for drawn in feed:
            if not begun:
                begun = True
                for fresh in self.start(feed):
                    yield fresh
            new = self.rows[drawn.row].take(drawn)
            yield drawn.row, new
            if new.reason is not None:
                feed.stream.stop(drawn.row)
            if all(row.over for row in self.rows):
                feed.cancel("stop")
                return
        for fresh in self.end(feed):
            yield fresh


class Batch:
    """All prompts of one request."""

    def __init__(self, served: Served, body: CompletionRequest, jobs: list[Job]) -> None:
        self.served, self.body, self.jobs = served, body, jobs
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.n = len(jobs[0].rows)
        self.choices = [Fresh() for job in jobs for _ in job.rows]
        self.jobs[0].feed = Feed(served, jobs[0].request)  # refused at once, if it is

    async def run(self) -> AsyncGenerator[tuple[int, Fresh], None]:
        """What is new, by choice; of some prompts at once."""
        news: asyncio.Queue[tuple[int, Fresh] | Exception | None] = asyncio.Queue()
        room = asyncio.Semaphore(TOGETHER)
        tasks = [asyncio.ensure_future(self._one(i, news, room)) for i in range(len(self.jobs))]
        try:
            left = len(tasks)
            while left:
                match await news.get():
                    case None:
                        left -= 1
                    case Exception() as error:
                        raise error
                    case i, fresh:
                        self.choices[i].add(fresh)
                        yield i, fresh
        finally:
            for task in tasks:
                task.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Free all slots; nothing happens to what is over."""
        for job in self.jobs:
            if job.feed is not None:
                job.feed.cancel()

    async def _one(
        self,
        i: int,
        news: "asyncio.Queue[tuple[int, Fresh] | Exception | None]",
        room: asyncio.Semaphore,
    ) -> None:
        job = self.jobs[i]
        try:
            async with room:
                feed = job.feed = job.feed or await self._submitted(job)
                async with aclosing(job.run(feed)) as fresh:
                    async for row, new in fresh:
                        news.put_nowait((i * self.n + row, new))
            news.put_nowait(None)
        except Exception as error:
            news.put_nowait(error)

    async def _submitted(self, job: Job) -> Feed:
        """Waits until there is room in the queue: the request as a whole was admitted."""
        while True:
            try:
                return Feed(self.served, job.request)
            except ApiError as error:
                if error.status != 429:
                    raise
                await asyncio.sleep(0.1)

    @property
    def usage(self) -> Usage:
        """Of all together."""
        streams = [job.feed.stream for job in self.jobs if job.feed is not None]
        drawn = sum(row.tokens for job in self.jobs for row in job.rows)
        if self.body.best_of is not None:
            drawn = sum(stream.completion for stream in streams)
        return Usage(
            prompt=sum(stream.prompt for stream in streams),
            cached=sum(stream.reused for stream in streams),
            completion=drawn,
            reasoning=0,
        )

    def frame(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """What surrounds choices."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
            **more,
        }

    def choice(self, i: int, fresh: Fresh) -> dict[str, Any]:
        """As the API has it."""
        told = self.body.logprobs is not None
        return fresh.choice(i, self.served.tokenizer, logprobs=told)


router = APIRouter()


@router.post("/v1/completions", responses=EITHER, response_class=Response)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continuations of raw prompts."""
    served: Served = request.app.state.served
    check_model(body.model, served)
    tell(request, ignored=body.unknown())
    with refusing("prompt"):
        settings = body.check()
        jobs = await asyncio.to_thread(_jobs, served, body, settings)
        for job in jobs:
            served.worker.engine.check(job.request)
    batch = Batch(served, body, jobs)
    if body.stream:
        return EventStream(_stream(request, batch), batch.cancel)
    return Whole(lambda: _whole(request, batch), batch.cancel)


async def _whole(request: Request, batch: Batch) -> dict[str, Any]:
    async with aclosing(batch.run()) as news:
        async for _ in news:
            pass
    tell(request, usage=asdict(batch.usage), finish=[fresh.reason for fresh in batch.choices])
    choices = [batch.choice(i, fresh) for i, fresh in enumerate(batch.choices)]
    return batch.frame(choices, usage=_usage(batch))


async def _stream(request: Request, batch: Batch) -> AsyncGenerator[bytes, None]:
    more = {"usage": None} if batch.body.include_usage else {}
    async with aclosing(batch.run()) as news:
        async for i, fresh in news:
            if fresh.text or fresh.tokens or fresh.reason:
                yield event(batch.frame([batch.choice(i, fresh)], **more))
    tell(request, usage=asdict(batch.usage), finish=[fresh.reason for fresh in batch.choices])
    if batch.body.include_usage:
        yield event(batch.frame([], usage=_usage(batch)))
    yield DONE


def _usage(batch: Batch) -> dict[str, Any]:
    said = usage(batch.usage)
    del said["completion_tokens_details"]
    return said


def _jobs(served: Served, body: CompletionRequest, settings: Settings) -> list[Job]:
    """Every prompt in tokens. Takes a while. Raises ValueError."""
    told = body.prompt
    alone = isinstance(told, str) or isinstance(told[0], int)
    prompts: list[Any] = [told] if alone else list(told)
    echoed = body.logprobs if body.echo else None
    jobs = []
    for prompt in prompts:
        served.must_fit([prompt] if isinstance(prompt, str) else [])
        tokens = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else served.tokenizer.decode(tokens)
        rows = [Continuation(served.tokenizer, settings) for _ in range(settings.n)]
        request = settings.request(served, tokens, prompt_logprobs=echoed)
        jobs.append(Job(text if body.echo else None, request, rows, body.max_tokens == 0))
    return jobs
