"""One answer: as it arrives, and when it is there."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gptoss.engine import Request
from gptoss.engine import Stream as Answering
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
        request: Request,
        submit: Callable[[Request], Answering],
        parser: Parser,
    ) -> None:
        """``submit``: of the engine; called when the first token is wanted."""
        self._request, self._submit, self._parser = request, submit, parser
        self._answering: Answering | None = None
        self._over = False
        self.completion = 0  # tokens so far

    def __iter__(self) -> Iterator[Delta]:
        if self._answering is None and not self._over:
            self._answering = self._submit(self._request)
        for drawn in self._answering or ():
            if self._over:
                return
            self.completion += 1
            yield from self._deltas(self._parser.push(drawn.token))
        yield from self._deltas(self._parser.finish())

    @property
    def reply(self) -> Reply:
        """The turn so far; taking it ends the turn."""
        self._over = True
        if self._answering is not None:
            self._answering.cancel()
        self._parser.finish()
        return Reply(
            messages=list(self._parser.messages),
            finish_reason=self._reason(),
            usage=Usage(
                prompt=len(self._request.prompt),
                reused=0 if self._answering is None else self._answering.reused,
                completion=self.completion,
            ),
            seed=self._request.seed,
        )

    def _reason(self) -> FinishReason:
        answering = self._answering
        if (
            answering is None
            or answering.finish != "stop"
            or answering.completion > self.completion
        ):
            return "length"
        messages = self._parser.messages
        return "tool_calls" if messages and messages[-1].recipient else "stop"

    @staticmethod
    def _deltas(events: list[Event]) -> Iterator[Delta]:
        return (event for event in events if isinstance(event, Delta))


def _text(message: Message) -> str:
    assert isinstance(message.content, str)
    return message.content
