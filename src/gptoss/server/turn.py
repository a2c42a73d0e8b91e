"""One turn of the model: a conversation in; what it says out, as it says it.

Every API that speaks in messages is built on this:

    turn = await begin(served, Ask(messages=conversation(...), settings=Settings(...)))
    async with turn:  # leaving it frees the slot, whoever leaves and why
        async for event in turn: ...  # Piece, Closed, Ended
    turn.usage, turn.messages(row)
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from gptoss.engine import Constraint, Drawn, Request
from gptoss.grammar import Choice, Format, constrain
from gptoss.server.errors import refusing
from gptoss.server.feed import Feed, Settings
from gptoss.server.served import Served
from gptoss.server.stops import Carried, StopStrings
from gptoss.text import harmony
from gptoss.text.messages import Developer, Message, System, Tool
from gptoss.text.parser import Delta, MessageEnd, Parser, Repair
from gptoss.text.parser import Event as Parsed

Reason = Literal["stop", "length", "tool_calls", "deadline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What the model is to answer. ``llm.llm.conversation`` makes the messages whole."""

    messages: Sequence[Message]  # the system's and the developer's, with the tools, among them
    settings: Settings = field(default_factory=Settings)
    format: Format | None = None  # of the final answer
    choice: Choice = "auto"  # of tools; see ``grammar.constrain``
    tools: Sequence[str] = ()  # that are run here; the messages offer them already. See ``loop``
    calls: int | None = None  # of those, at most


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of one message."""

    row: int  # which of the n answers
    index: int  # which message of this turn
    channel: str | None
    recipient: str | None  # "functions.NAME": the text is a call's arguments
    call: str | None  # the call's id, if it is one
    text: str  # may be empty where only tokens are left to tell
    drawn: Carried  # the tokens that begin in it


@dataclass(frozen=True, slots=True)
class Closed:
    """A message is complete, or the answer was cut inside it."""

    row: int
    index: int
    message: Message
    call: str | None


@dataclass(frozen=True, slots=True)
class Ended:
    """An answer is over. "deadline": it took longer than a request may."""

    row: int
    reason: Reason


Event = Piece | Closed | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a turn cost, in tokens."""

    prompt: int
    cached: int  # of the prompt, not computed again
    completion: int
    reasoning: int  # of the completion, text on the analysis channel


async def begin(served: Served, ask: Ask) -> "Turn":
    """Queue the turn. Raises ApiError: what is asked cannot be, or too many wait."""
    loop = asyncio.get_running_loop()
    with refusing("tools" if ask.format is None else "response_format"):
        constraint = await loop.run_in_executor(served.compiling, _constraint, served, ask)
    with refusing():
        request = await asyncio.to_thread(_request, served, ask, constraint)
    return Turn(served, ask, Feed(served, request))


def _constraint(served: Served, ask: Ask) -> Constraint | None:
    return constrain(
        served.tokenizer,
        format=ask.format,
        tools=_tools(ask.messages),
        choice=ask.choice,
        builtin=[
            b
            for m in ask.messages
            if isinstance(m.content, System)
            for b in m.content.builtin_tools
        ],
    )


def _request(served: Served, ask: Ask, constraint: Constraint | None) -> Request:
    served.must_fit(_texts(ask.messages))
    prompt = harmony.render_for_completion(ask.messages, served.tokenizer)
    places = boundaries(ask.messages, prompt, served)
    return ask.settings.request(served, prompt, constraint=constraint, boundaries=places)


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    """What is sure to be read; old thoughts may be left out."""
    for message in messages:
        if isinstance(message.content, Developer):
            yield message.content.instructions or ""
        elif isinstance(message.content, str) and message.channel != "analysis":
            yield message.content


def _tools(messages: Sequence[Message]) -> list[Tool]:
    developers = (m.content for m in messages if isinstance(m.content, Developer))
    return [tool for developer in developers for tool in developer.tools]


def boundaries(messages: Sequence[Message], prompt: Sequence[int], served: Served) -> list[int]:
    """Where a later prompt may part from this one.

    Behind the instructions, which other conversations share; behind the last words of the user,
    because thoughts that follow them are left out once they led to an answer; behind the last
    message. Ends of messages are seen in the tokens: no text can contain one.
    """
    closing = {served.tokenizer.special("<|end|>"), served.tokenizer.special("<|call|>")}
    ends = [at for at, token in enumerate(prompt, 1) if token in closing]
    front = sum(m.role in ("system", "developer") for m in messages)
    after = next((i for i, m in enumerate(reversed(messages)) if m.role == "user"), 0)
    wanted = (front - 1, len(ends) - 1 - after, len(ends) - 1)
    return sorted({ends[i] for i in wanted if 0 <= i < len(ends)})


class Turn:
    """The answers to one request, as they come."""

    def __init__(self, served: Served, ask: Ask, feed: Feed) -> None:
        self._feed = feed
        names = [tool.name for tool in _tools(ask.messages)]
        self._readers = [Reader(row, served, names, ask) for row in range(ask.settings.n)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        """Raises ApiError, or what the engine raised."""
        open_ = len(self._readers)
        async for drawn in self._feed:
            for event in self._readers[drawn.row].take(drawn):
                yield event
                if isinstance(event, Ended):  # perhaps by a stop string: the engine does not know
                    open_ -= 1
                    self._feed.stream.stop(drawn.row)
            if not open_:
                self._feed.cancel("stop")
                return
        for reader, answer in zip(self._readers, self._feed.stream.answers, strict=True):
            for event in reader.end("deadline" if answer.finish == "deadline" else "length"):
                yield event

    def cancel(self) -> None:
        """Free the slot; nothing happens if the turn is over."""
        self._feed.cancel()

    @property
    def usage(self) -> Usage:
        """Up to now; ``cached`` is known once something came."""
        return Usage(
            prompt=self._feed.stream.prompt,
            cached=self._feed.stream.reused,
            completion=sum(reader.tokens for reader in self._readers),
            reasoning=sum(reader.reasoning for reader in self._readers),
        )

    def messages(self, row: int = 0) -> list[Message]:
        """What an answer's messages are, those that are complete."""
        return self._readers[row].messages


class Reader:
    """One answer: tokens in, events out. Whatever the tokens are, it does not raise."""

    def __init__(self, row: int, served: Served, tools: Sequence[str], ask: Ask) -> None:
        self.row, self._served = row, served
        self.messages: list[Message] = []
        self.tokens = self.reasoning = 0
        self.reason: Reason | None = None  # why it is over
        ignored = ask.settings.ignore_eos
        self._final = frozenset[int]() if ignored else served.tokenizer.stop_tokens
        self._parser = Parser(served.tokenizer, tools=tools)
        self._stops = ask.settings.stop
        self._watch = StopStrings(self._stops)
        self._carried: list[Drawn] = []  # read, and their text not told yet
        self._open = -1  # the message whose text came last
        self._said: list[str] = []  # what came of it
        self._calls: dict[int, str] = {}

    def take(self, drawn: Drawn) -> list[Event]:
        """The next token. Nothing comes of what follows the end."""
        if self.reason is not None:
            return []
        self.tokens += 1
        special = self._served.tokenizer.is_special(drawn.token)
        if not special:
            self._carried.append(drawn)
        events = self._read(self._parser.push(drawn.token))
        if special:
            self._carried.clear()  # a header's words, told by what they make of the message
        if self.reason is None and drawn.token in self._final:
            events += self.end("stop")
        return events

    def end(self, reason: Reason) -> list[Event]:
        """No token follows, for this reason."""
        if self.reason is not None:
            return []
        parsed = self._parser.finish()
        if reason != "stop":
            parsed = [event for event in parsed if not self._cut(event, parsed)]
        events = self._read(parsed)
        return events if self.reason is not None else [*events, self._end(reason)]

    def _cut(self, event: Parsed, parsed: list[Parsed]) -> bool:
        """Whether it is of a message whose header was cut: "<|channel|>ana" says nothing."""
        ends = (e for e in parsed if isinstance(e, MessageEnd))
        broken = {e.message_index for e in ends if Repair.NO_MESSAGE in e.message.repairs}
        return event.message_index in broken and event.message_index != self._open

    def _read(self, parsed: list[Parsed]) -> list[Event]:
        events: list[Event] = []
        for event in parsed:
            if self.reason is None:
                events += self._said_more(event) if isinstance(event, Delta) else self._close(event)
        return events

    def _said_more(self, delta: Delta) -> list[Event]:
        drawn = tuple(self._carried)
        self._carried.clear()
        self.reasoning += len(drawn) if delta.channel == "analysis" else 0
        text = delta.text
        if self._stops and delta.recipient is None and delta.channel != "analysis":
            text, drawn = self._watch.feed(text, drawn)
        events = self._piece(delta, text, drawn)
        if self._watch.found is None:
            return events
        message = Message(role=delta.role, content="".join(self._said), channel=delta.channel)
        return [*events, self._closed(delta.message_index, message), self._end("stop")]

    def _close(self, end: MessageEnd) -> list[Event]:
        m = end.message
        rest = Delta(end.message_index, m.role, m.channel, m.recipient, "")
        events = self._piece(rest, *self._watch.flush())
        self._watch = StopStrings(self._stops)
        return [*events, self._closed(end.message_index, m)]

    def _piece(self, delta: Delta, text: str, drawn: Carried) -> list[Event]:
        if not text and not drawn:
            return []
        self._open = delta.message_index
        self._said.append(text)
        call = self._call(delta.message_index, delta.recipient)
        return [
            Piece(self.row, delta.message_index, delta.channel, delta.recipient, call, text, drawn)
        ]

    def _closed(self, index: int, message: Message) -> Closed:
        self._said.clear()
        call = self._call(index, message.recipient)
        if call is not None:
            self._served.thoughts.keep(call, [m for m in self.messages if m.channel == "analysis"])
        self.messages.append(message)
        return Closed(self.row, index, message, call)

    def _call(self, index: int, recipient: str | None) -> str | None:
        if recipient is None:
            return None
        return self._calls.setdefault(index, f"call_{secrets.token_hex(12)}")

    def _end(self, reason: Reason) -> Ended:
        called = reason == "stop" and any(m.recipient for m in self.messages)
        self.reason = "tool_calls" if called else reason
        return Ended(self.row, self.reason)
