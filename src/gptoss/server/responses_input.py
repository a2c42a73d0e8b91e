"""The input of a response: items as clients write them, checked, and turned into what is kept."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from gptoss.server.messages import MOST_PARTS
from gptoss.server.responses_items import (
    HOSTED,
    function_call,
    message,
    new_id,
    output_text,
    reasoning,
    unsealed,
)
from gptoss.server.schema import Body
from gptoss.text.tools import PATH

KINDS = (
    *("message", "reasoning", "function_call", "function_call_output", "item_reference"),
    *HOSTED,
)
Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
Phase = Literal["commentary", "final_answer"]


class Part(Body):
    """A piece of text. Of other pieces (images, audio, files) this model has no notion."""

    type: Literal["input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: object) -> object:
        if isinstance(value, str) and value not in ("input_text", "output_text", "refusal"):
            raise ValueError(f"the model reads input_text and output_text only, not {value[:40]!r}")
        return value

    @model_validator(mode="after")
    def _something(self) -> "Part":
        if self.said is None:
            raise ValueError("a part needs its text")
        return self

    @property
    def said(self) -> str | None:
        """Its text."""
        return self.refusal if self.type == "refusal" else self.text


def form(value: object) -> str | None:
    """Whether a text or a list was given; None: neither."""
    return "a-text" if isinstance(value, str) else "a-list" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("a-text")]
    | Annotated[list[Part], Field(max_length=MOST_PARTS), Tag("a-list")],
    Discriminator(
        form,
        custom_error_type="content",
        custom_error_message="a string or a list of parts was expected",
    ),
]


class MessageItem(Body):
    """Text of anybody."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: Phase | None = None
    id: Id | None = None
    status: Status | None = None

    def kept(self) -> dict[str, Any]:
        """As it is kept."""
        text = text_of(self.content)
        said = message(self.role, text)
        said |= {"id": self.id or said["id"], "status": self.status or "completed"}
        if self.role == "assistant":
            said |= {"phase": self.phase, "content": [output_text(text)]}
        return said


class ReasoningText(Body):
    """A piece of thought."""

    type: Literal["reasoning_text", "text"]
    text: str


class SummaryText(Body):
    """A piece of a summary. There are none here; another model may have written them."""

    type: Literal["summary_text"]
    text: str


class ReasoningItem(Body):
    """What a model thought."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(max_length=MOST_PARTS)] | None = None
    summary: Annotated[list[SummaryText], Field(max_length=MOST_PARTS)] | None = None
    encrypted_content: str | None = None
    id: Id | None = None
    status: Status | None = None

    def kept(self) -> dict[str, Any]:
        """As it is kept; of several sources the words themselves come first."""
        parts = self.content or []
        text = "".join(p.text for p in parts) or unsealed(self.encrypted_content or "")
        return reasoning(
            self.id or new_id("rs"),
            text or "\n\n".join(part.text for part in self.summary or []),
            self.status or "completed",
        )


class FunctionCall(Body):
    """A call of a function; the arguments are JSON as text, and taken as they are."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    namespace: Annotated[str, Field(max_length=256)] | None = None
    id: Id | None = None
    status: Status | None = None

    @field_validator("name", "namespace")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        if value is not None and not PATH.fullmatch(value):
            raise ValueError("a function's name has letters, digits, _ and -, at most 64")
        return value

    def kept(self) -> dict[str, Any]:
        """As it is kept."""
        name = f"{self.namespace}.{self.name}" if self.namespace else self.name
        id, status = self.id or new_id("fc"), self.status or "completed"
        return function_call(id, self.call_id, name, self.arguments, status)


class FunctionCallOutput(Body):
    """What a call resulted in."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    output: Content
    id: Id | None = None
    status: Status | None = None

    def kept(self) -> dict[str, Any]:
        """As it is kept."""
        return {
            "type": "function_call_output",
            "id": self.id or new_id("fco"),
            "call_id": self.call_id,
            "output": text_of(self.output),
            "status": self.status or "completed",
        }


class Logs(Body):
    """What code printed."""

    type: Literal["logs"]
    logs: str


class CodeCall(Body):
    """Code that a server has run."""

    type: Literal["code_interpreter_call"]
    id: Id | None = None
    code: str | None = None
    outputs: Annotated[list[Logs], Field(max_length=MOST_PARTS)] | None = None
    container_id: Id | None = None
    status: Annotated[str, Field(max_length=64)] | None = None

    def kept(self) -> dict[str, Any]:
        """As it is kept."""
        return self.model_dump() | {"id": self.id or new_id("ci")}


class ToolCall(Body):
    """Another tool's call that a server has run; without its output, it is passed over."""

    type: Literal["web_search_call", "mcp_call"]
    id: Id | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    arguments: str | None = None
    output: str | None = None
    status: Annotated[str, Field(max_length=64)] | None = None

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        if value is not None and not PATH.fullmatch(value):
            raise ValueError("a tool's name has letters, digits, _ and -, at most 64")
        return value

    def kept(self) -> dict[str, Any]:
        """As it is kept."""
        return self.model_dump() | {"id": self.id or new_id("mcp")}


class ItemReference(Body):
    """An item of a stored response."""

    type: Literal["item_reference"] | None = None
    id: Annotated[str, Field(min_length=1, max_length=256)]


def _kind(value: object) -> str | None:
    """Which item it is; a message and a reference may leave their type out."""
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    if kind is None:
        kind = "message" if "role" in value else "item_reference" if "id" in value else None
    return f"{kind}-item" if kind in KINDS else None


Item = Annotated[
    Annotated[MessageItem, Tag("message-item")]
    | Annotated[ReasoningItem, Tag("reasoning-item")]
    | Annotated[FunctionCall, Tag("function_call-item")]
    | Annotated[FunctionCallOutput, Tag("function_call_output-item")]
    | Annotated[CodeCall, Tag("code_interpreter_call-item")]
    | Annotated[ToolCall, Tag("web_search_call-item")]
    | Annotated[ToolCall, Tag("mcp_call-item")]
    | Annotated[ItemReference, Tag("item_reference-item")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message=f"type must be one of {', '.join(KINDS)}",
    ),
]


def text_of(content: str | list[Part]) -> str:
    """Parts are one text."""
    if isinstance(content, str):
        return content
    return "".join(part.said or "" for part in content)
