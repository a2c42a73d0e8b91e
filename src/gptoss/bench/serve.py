"""Load on a server: any that speaks OpenAI's chat completions or completions, streaming.

Every request is a thread with a connection of its own and a blocking read; what a read brings is
one arrival. Measures from outside: no word of it is about what the server is made of.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, Literal
from urllib.parse import urlsplit

from gptoss.bench.latency import Outcome, summary
from gptoss.errors import GptOssError

WORDS = "the of and to in is that for it as was with be by on not he his but at are this".split()
TEXTS = ("content", "reasoning", "reasoning_content", "refusal")  # of a chat's delta
MOST = 16 << 20  # bytes of a reply that is no stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where requests go."""

    url: str  # of the API: http://127.0.0.1:8000/v1; /v1 may be left out
    model: str
    api: Literal["chat", "completions"] = "chat"
    key: str | None = None
    timeout: float = 120.0  # seconds without a byte
    ignore_eos: bool = False  # asks for answers of full length; not every server knows the word


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked, and how much at once. The same seed asks the same."""

    requests: int
    rate: float | None = None  # open loop: arrivals in a second, Poisson; None: closed loop
    clients: int = 1  # closed loop: each asks again when it has its answer
    prompt: tuple[int, int] = (16, 256)  # least and most words of a prompt, drawn on a log scale
    answer: tuple[int, int] = (16, 128)  # the same of max_tokens
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1 or self.clients < 1:
            raise ValueError("requests and clients must be at least 1")
        if self.rate is not None and not 0.0 < self.rate < float("inf"):
            raise ValueError(f"rate must be above 0 in a second, not {self.rate}")
        for name in ("prompt", "answer"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name}: {low}:{high} is no range of positive lengths")

    def questions(self) -> list[tuple[str, int]]:
        """Prompt and max_tokens of each request."""
        draw = random.Random(self.seed)
        return [
            (" ".join(draw.choices(WORDS, k=_between(draw, *self.prompt))),
             _between(draw, *self.answer))
            for _ in range(self.requests)
        ]  # fmt: skip

    def arrivals(self) -> list[float]:
        """Open loop: seconds from the start at which each request is sent."""
        draw, at = random.Random(self.seed + 1), 0.0
        return [at := at + draw.expovariate(self.rate or 1.0) for _ in range(self.requests)]


def _between(draw: random.Random, low: int, high: int) -> int:
    """From low to high, every doubling as likely as the next."""
    return min(high, int(low * ((high + 1) / low) ** draw.random()))


def first_model(server: str, key: str | None, timeout: float = 30.0) -> str:
    """The first of /models. Raises ValueError for no address, GptOssError if it does not say."""
    connection, path, headers = _connect(server, key, timeout)
    try:
        with closing(connection) as c:
            c.request("GET", f"{path}/models", headers=headers)
            response = c.getresponse()
            said = response.read(MOST)
        if response.status != 200:
            raise GptOssError(f"{server}: /models answers {response.status}; name the model")
        return str(json.loads(said)["data"][0]["id"])
    except (OSError, HTTPException) as error:
        raise GptOssError(f"{server}: cannot be reached ({error})") from None
    except (ValueError, LookupError, TypeError):
        raise GptOssError(f"{server}: /models names no model; name one yourself") from None


def serve(
    server: Server, load: Load, watch: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Put the load on the server; the facts, as one JSON line has them.

    Raises:
        ValueError: an address that is none.
        GptOssError: not one request was answered.
    """
    _connect(server.url, server.key, server.timeout)
    questions, lock, done = load.questions(), threading.Lock(), 0
    outcomes = [Outcome(0.0) for _ in questions]
    started, burnt = time.perf_counter(), time.process_time()

    def ask(i: int, due: float) -> None:
        nonlocal done
        outcomes[i] = _ask(server, *questions[i], due)
        with lock:
            done += 1
            if watch is not None:
                watch(done, load.requests)

    threads = _open(load, ask, started) if load.rate else _closed(load, ask)
    for thread in threads:
        thread.join()
    seconds, burnt = time.perf_counter() - started, time.process_time() - burnt
    if all(o.failure for o in outcomes):
        raise GptOssError(f"{server.url}: every request failed: {outcomes[0].failure}")
    about = {"url": server.url, "model": server.model, "api": server.api}
    about |= {"loop": "open" if load.rate else "closed", **asdict(load)}
    return summary("serve", about, outcomes, seconds, burnt)


def _open(load: Load, ask: Callable[[int, float], None], started: float) -> list[threading.Thread]:
    """Requests are sent when they are due, whatever became of those before."""
    threads = []
    for i, at in enumerate(load.arrivals()):
        time.sleep(max(0.0, started + at - time.perf_counter()))
        threads.append(threading.Thread(target=ask, args=(i, started + at), daemon=True))
        threads[-1].start()
    return threads


def _closed(load: Load, ask: Callable[[int, float], None]) -> list[threading.Thread]:
    """A client sends its next request when it has its answer."""
    left, lock = iter(range(load.requests)), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                i = next(left, None)
            if i is None:
                return
            ask(i, time.perf_counter())

    threads = [threading.Thread(target=client, daemon=True) for _ in range(load.clients)]
    for thread in threads:
        thread.start()
    return threads


def _ask(server: Server, prompt: str, most: int, due: float) -> Outcome:
    """One request from beginning to end; it never raises."""
    outcome = Outcome(due, sent=time.perf_counter())
    body: dict[str, Any] = {"model": server.model, "max_tokens": most, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if server.api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if server.ignore_eos:
        body["ignore_eos"] = True
    where = "/chat/completions" if server.api == "chat" else "/completions"
    try:
        connection, path, headers = _connect(server.url, server.key, server.timeout)
        headers |= {"Content-Type": "application/json", "Accept": "text/event-stream"}
        with closing(connection) as c:
            c.request("POST", path + where, json.dumps(body), headers)
            outcome.failure = _read(c.getresponse(), outcome)
    except TimeoutError:
        outcome.failure = "timeout"
    except ConnectionRefusedError:
        outcome.failure = "connection refused"
    except (OSError, HTTPException) as error:
        outcome.failure = f"connection lost ({type(error).__name__})"
    outcome.end = time.perf_counter()
    return outcome


def _read(response: HTTPResponse, outcome: Outcome) -> str | None:
    """Take the stream in; what went wrong, None if nothing did."""
    if response.status != 200:
        response.read(MOST)
        return f"status {response.status}"
    if not (response.getheader("Content-Type") or "").startswith("text/event-stream"):
        response.read(MOST)
        return "no event stream"
    finished = False
    for event, at in _events(response):
        if event == b"[DONE]":
            return None if outcome.arrivals else "no text"
        try:
            said = json.loads(event)
            if said.get("error"):
                return "error event"
            if usage := said.get("usage"):
                outcome.prompt, outcome.completion = (
                    usage["prompt_tokens"],
                    usage["completion_tokens"],
                )
            for choice in said.get("choices") or ():
                finished = finished or choice.get("finish_reason") is not None
                if _has_text(choice):
                    outcome.arrivals.append(at)
        except (ValueError, LookupError, TypeError, AttributeError):
            return "event that is not understood"
    return "no [DONE]" if finished else "cut off"


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("tool_calls") or any(map(delta.get, TEXTS)))


def _events(response: HTTPResponse) -> Iterator[tuple[bytes, float]]:
    """The data of each event, and when it came."""
    buffer = b""
    while piece := response.read1(1 << 16):
        at = time.perf_counter()
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip(), at


def _connect(
    url: str, key: str | None, timeout: float
) -> tuple[HTTPConnection, str, dict[str, str]]:
    """A connection that is not open yet, the path of the API, and headers."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: no address of a server such as http://127.0.0.1:8000/v1")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return connection, parts.path.rstrip("/") or "/v1", headers
