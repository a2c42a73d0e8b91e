"""Messages as chat completions write them -> a conversation as the model reads it.

The system's and the developer's text are the developer's instructions. What an assistant thought
(``reasoning`` or ``reasoning_content``) goes back where it was; before a call whose thoughts the
client dropped, they are put back from memory. An assistant's text beside calls is commentary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from gptoss.grammar import Format, JsonSchema
from gptoss.llm.llm import conversation
from gptoss.server.errors import refused
from gptoss.server.schema import NAME, Body
from gptoss.server.served import Thoughts
from gptoss.text.messages import Developer, Effort, Message, Tool
from gptoss.text.tools import PATH

Name = Annotated[str, Field(pattern=NAME)]
MOST_MESSAGES, MOST_PARTS = 16_384, 4096


class TextPart(Body):
    """A piece of text. Of other pieces (images, audio, files) this model has no notion."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: object) -> object:
        if isinstance(value, str) and value != "text":
            raise ValueError(f"the model reads text only, not {value[:40]!r}")
        return value


Text = str | Annotated[list[TextPart], Field(max_length=MOST_PARTS)]


class Instructions(Body):
    """From the system or the developer."""

    role: Literal["system", "developer"]
    content: Text
    name: Name | None = None


class UserMessage(Body):
    """From the user."""

    role: Literal["user"]
    content: Text
    name: Name | None = None


class Function(Body):
    """A call of a function; the arguments are JSON as text, and taken as they are."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class Call(Body):
    """A call of a tool."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: Function

    @field_validator("function")
    @classmethod
    def _plain(cls, value: Function) -> Function:
        if not PATH.fullmatch(value.name):
            raise ValueError("a function's name has letters, digits, _ and -, at most 64")
        return value


class AssistantMessage(Body):
    """What the model said, or is to believe it said."""

    role: Literal["assistant"]
    content: Text | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Call], Field(max_length=1024)] | None = None
    name: Name | None = None


class ToolMessage(Body):
    """What a call resulted in."""

    role: Literal["tool"]
    content: Text
    tool_call_id: Annotated[str, Field(max_length=256)]
    name: Annotated[str, Field(max_length=256)] | None = None


AnyMessage = Annotated[
    Instructions | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def as_conversation(
    messages: Sequence[Instructions | UserMessage | AssistantMessage | ToolMessage],
    *,
    effort: Effort,
    tools: Sequence[Tool],
    format: tuple[str, Format] | None = None,
    thoughts: Thoughts,
) -> list[Message]:
    """All that the model is to read. Raises ApiError naming the message that cannot be.

    ``format``: a name and a schema that the model is shown, because it holds to it better then.
    """
    front = 0
    while front < len(messages) and messages[front].role in ("system", "developer"):
        front += 1
    told = [text_of(m.content) for m in messages[:front]]
    if format is not None and isinstance(format[1], JsonSchema):
        shown = json.dumps(format[1].schema, ensure_ascii=False, separators=(",", ":"))
        told.append(f"# Response Formats\n\n## {format[0]}\n\n{shown}")
    developer = Developer(instructions="\n\n".join(told) if told else None, tools=tuple(tools))
    turns = [Message(role="developer", content=developer)]
    turns += _rest(messages[front:], front, thoughts)
    return conversation(turns, effort=effort, current_date=date.today().isoformat())


def text_of(content: str | list[TextPart] | None) -> str:
    """Parts are one text."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def _rest(
    messages: Sequence[Instructions | UserMessage | AssistantMessage | ToolMessage],
    front: int,
    thoughts: Thoughts,
) -> Iterator[Message]:
    called: dict[str, str] = {}  # id -> recipient
    for i, m in enumerate(messages, front):
        match m:
            case Instructions():
                content = Developer(instructions=text_of(m.content))
                yield Message(role="developer", content=content)
            case UserMessage():
                yield Message(role="user", content=text_of(m.content), name=m.name)
            case AssistantMessage():
                yield from _assistant(m, called, thoughts)
            case ToolMessage():
                yield _result(m, i, called)


def _assistant(
    m: AssistantMessage, called: dict[str, str], thoughts: Thoughts
) -> Iterator[Message]:
    calls = m.tool_calls or []
    kept = thoughts.before(calls[0].id) if calls else ()
    thought = m.reasoning or m.reasoning_content
    if thought and not any(k.recipient for k in kept):
        yield Message(role="assistant", channel="analysis", content=thought)
    else:  # the client dropped it, or cannot know of the tools that ran here
        yield from kept
    if text := text_of(m.content) or m.refusal:
        channel = "commentary" if calls else "final"
        yield Message(role="assistant", channel=channel, content=text)
    for call in calls:
        name = call.function.name
        called[call.id] = name if "." in name else f"functions.{name}"
        yield Message(
            role="assistant",
            channel="commentary",
            recipient=called[call.id],
            content_type="json",
            content=call.function.arguments,
        )


def _result(m: ToolMessage, i: int, called: Mapping[str, str]) -> Message:
    recipient = called.get(m.tool_call_id)
    if recipient is None:
        where = f"messages[{i}].tool_call_id"
        raise refused(f"{where}: no call before it has the id {m.tool_call_id[:80]!r}", where)
    return Message(
        role="tool",
        name=recipient,
        channel="commentary",
        recipient="assistant",
        content=text_of(m.content),
    )


def depth(value: Any, most: int) -> bool:
    """Whether lists and dicts are nested at most so deep; does not recurse."""
    layer = [value]
    for _ in range(most + 1):
        inner: list[Any] = []
        for v in layer:
            if isinstance(v, dict):
                inner += v.values()
            elif isinstance(v, list):
                inner += v
        layer = inner
        if not layer:
            return True
    return False
