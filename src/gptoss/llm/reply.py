"""One answer: as it arrives, and when it is there."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gptoss.text.messages import Message
from gptoss.text.parser import Delta, Event, Parser

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer cost, in tokens."""

    prompt: int
    reused: int  # of the prompt, not computed again
    completion: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A turn of the model. Add ``messages`` to the conversation to go on."""

    messages: list[Message]
    finish_reason: FinishReason  # "length": cut off, by a limit or by its reader
    usage: Usage
    seed: int  # the same prompt, settings and seed give this reply again

    @property
    def text(self) -> str:
        """The final answer; "" if the model did not come to one."""
        return "".join(_text(m) for m in self.messages if m.channel == "final")

    @property
    def analysis(self) -> str:
        """What the model thought."""
        thoughts = [m for m in self.messages if m.channel == "analysis" and not m.recipient]
        return "\n".join(map(_text, thoughts))

    @property
    def tool_calls(self) -> list[Message]:
        """Messages to a tool: ``recipient`` is "functions.name", ``content`` its arguments."""
        return [m for m in self.messages if m.recipient is not None]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON knows it."""
        return {
            "text": self.text,
            "analysis": self.analysis,
            "messages": [
                {k: v for k, v in asdict(m).items() if v is not None} | {"repairs": [*m.repairs]}
                for m in self.messages
            ],
            "finish_reason": self.finish_reason,
            "usage": asdict(self.usage),
            "seed": self.seed,
        }


class Stream:
    """An answer as it arrives: iterate over its ``Delta``s, then (or when you stop) take ``reply``.

    An exception inside the loop, Ctrl-C included, leaves a ``reply`` with what came until then.
    """

    def __init__(
        self,
        tokens: Iterator[int],
        parser: Parser,
        *,
        stop: frozenset[int],
        prompt: int,
        seed: int,
        reused: Callable[[], int],
    ) -> None:
        """``reused`` tells, once the first token is there, what the cache had of the prompt."""
        self._tokens, self._parser, self._stop = tokens, parser, stop
        self._prompt, self._seed, self._reused = prompt, seed, reused
        self._last: int | None = None
        self._shared = 0
        self.completion = 0  # tokens so far

    def __iter__(self) -> Iterator[Delta]:
        for token in self._tokens:
            if self._last is None:
                self._shared = self._reused()
            self.completion += 1
            self._last = token
            yield from self._deltas(self._parser.push(token))
        yield from self._deltas(self._parser.finish())

    @property
    def reply(self) -> Reply:
        """The turn so far; taking it ends the turn."""
        self._tokens = iter(())
        self._parser.finish()
        return Reply(
            messages=list(self._parser.messages),
            finish_reason=self._reason(),
            usage=Usage(prompt=self._prompt, reused=self._shared, completion=self.completion),
            seed=self._seed,
        )

    def _reason(self) -> FinishReason:
        if self._last is None or self._last not in self._stop:
            return "length"
        messages = self._parser.messages
        return "tool_calls" if messages and messages[-1].recipient else "stop"

    @staticmethod
    def _deltas(events: list[Event]) -> Iterator[Delta]:
        return (event for event in events if isinstance(event, Delta))


def _text(message: Message) -> str:
    assert isinstance(message.content, str)
    return message.content
