"""What the model says, as chat completions say it. A whole answer is the sum of its deltas."""

import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gptoss.engine import Drawn
from gptoss.server.loop import Ran
from gptoss.server.loop import Said as Event
from gptoss.server.served import Served
from gptoss.server.turn import Closed, Ended, Piece, Usage
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.tools import PATH

LEAST = -9999.0  # where a probability is 0: JSON has no infinity


@dataclass(slots=True)
class Said:
    """One of the n answers, up to now."""

    content: str | None = None
    reasoning: str | None = None
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)  # by message
    executed: list[dict[str, Any]] = field(default_factory=list)  # calls that were run here
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    last: dict[str, int] = field(default_factory=dict)  # which message each field's text was of


class Speech:
    """The answers to one request."""

    def __init__(self, served: Served, n: int, *, logprobs: bool = False) -> None:
        self.n, self._served, self._logprobs = n, served, logprobs
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.rows = [Said() for _ in range(n)]

    @property
    def reasons(self) -> list[str | None]:
        """Why each answer ended."""
        return [said.reason for said in self.rows]

    def deltas(self, event: Event) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """What is new, with the logprobs of its tokens; also remembered for ``whole``."""
        said = self.rows[event.row]
        match event:
            case Piece(call=None):
                key = "reasoning" if event.channel == "analysis" else "content"
                text = self._joined(said, key, event)
                told = logprobs_of(event.drawn, self._served.tokenizer) if self._logprobs else []
                told = told if key == "content" else []
                said.logprobs += told
                if text or told:
                    yield {name: text for name in _names(key)}, told
            case Piece():
                yield from ((delta, []) for delta in _called(said, event, event.text))
            case Ran():
                said.executed.append(_executed(event, len(said.executed)))
                yield {"executed_tools": said.executed[-1:]}, []
            case Closed(call=str()) if not str(event.message.content).strip():
                yield from ((delta, []) for delta in _called(said, event, "{}"))
            case Ended():
                said.reason = "length" if event.reason == "deadline" else event.reason

    def take(self, event: Event) -> None:
        """Remember it for ``whole``."""
        for _ in self.deltas(event):
            pass

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """The same as chunks of a stream."""
        for delta, told in self.deltas(event):
            yield self.chunk(event.row, delta, logprobs=told)
        if isinstance(event, Ended):
            yield self.chunk(event.row, {}, reason=self.rows[event.row].reason)

    def chunk(
        self,
        row: int,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: Iterable[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """One chunk."""
        told = {"content": [*logprobs], "refusal": None} if logprobs else None
        choice = {"index": row, "delta": delta, "logprobs": told, "finish_reason": reason}
        return self.frame("chat.completion.chunk", [choice])

    def whole(self, spent: Usage) -> dict[str, Any]:
        """All of it as one document."""
        choices = [
            {
                "index": row,
                "message": _message(said),
                "logprobs": {"content": said.logprobs, "refusal": None} if self._logprobs else None,
                "finish_reason": said.reason,
            }
            for row, said in enumerate(self.rows)
        ]
        return self.frame("chat.completion", choices, usage=usage(spent))

    def frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """What surrounds choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self._served.name,
            "system_fingerprint": None,
            "choices": choices,
            **more,
        }

    def _joined(self, said: Said, key: str, piece: Piece) -> str:
        """The piece's text, behind a newline if another message came before it."""
        new = said.last.get(key, piece.index) != piece.index
        text = "\n" + piece.text if new and piece.text else piece.text
        if piece.text:
            said.last[key] = piece.index
        if text:
            setattr(said, key, (getattr(said, key) or "") + text)
        return text


def usage(spent: Usage) -> dict[str, Any]:
    """In OpenAI's words."""
    return {
        "prompt_tokens": spent.prompt,
        "completion_tokens": spent.completion,
        "total_tokens": spent.prompt + spent.completion,
        "prompt_tokens_details": {"cached_tokens": spent.cached},
        "completion_tokens_details": {"reasoning_tokens": spent.reasoning},
    }


def logprob(drawn: float | None) -> float:
    """As JSON can say it."""
    return LEAST if drawn is None else max(drawn, LEAST)


def _names(key: str) -> tuple[str, ...]:
    """Clients disagree about the name of reasoning."""
    return ("reasoning", "reasoning_content") if key == "reasoning" else ("content",)


def _called(said: Said, event: Piece | Closed, arguments: str) -> Iterator[dict[str, Any]]:
    """More of a call: first its name, then its arguments."""
    recipient = event.recipient if isinstance(event, Piece) else event.message.recipient
    if event.index not in said.calls:
        name = (recipient or "").removeprefix("functions.")
        if not PATH.fullmatch(name):
            name = "unknown"
        said.calls[event.index] = {
            "id": event.call,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        first = {"index": len(said.calls) - 1, **said.calls[event.index]}
        yield {"tool_calls": [first | {"function": {"name": name, "arguments": ""}}]}
    if arguments:
        said.calls[event.index]["function"]["arguments"] += arguments
        at = list(said.calls).index(event.index)
        yield {"tool_calls": [{"index": at, "function": {"arguments": arguments}}]}


def _executed(ran: Ran, index: int) -> dict[str, Any]:
    """A call that was run here, as Groq tells it."""
    return {
        "index": index,
        "type": ran.owner,
        "name": (ran.call.recipient or "").removeprefix("functions."),
        "arguments": str(ran.call.content),
        "output": ran.result.text,
    }


def _message(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
    if said.reasoning is not None:
        message |= dict.fromkeys(_names("reasoning"), said.reasoning)
    if said.executed:
        message["executed_tools"] = said.executed
    if said.calls:
        message["tool_calls"] = list(said.calls.values())
    return message


def logprobs_of(drawn: Iterable[Drawn], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Tokens as both APIs tell them."""
    return [
        _token(d.token, d.logprob, tokenizer)
        | {"top_logprobs": [_token(t, p, tokenizer) for t, p in d.top]}
        for d in drawn
    ]


def _token(token: int, p: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode_bytes([token])
    said = text.decode("utf-8", "replace")
    return {"token": said, "logprob": logprob(p), "bytes": list(text)}
