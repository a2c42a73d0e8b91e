"""What a tool is: ``Kit``, once for a whole server, and ``Opened``, once for each conversation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from gptoss.text.messages import Tool

Builtin = Literal["browser", "python"]


class ToolError(Exception):
    """A call came to nothing; the message is for the model, which may try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What the model is told of a tool."""

    builtin: Builtin | None = None  # a section of the system message, known from training
    functions: Sequence[Tool] = ()  # of the developer message
    instructions: str | None = None  # of the developer, behind the caller's own


class Opened(Protocol):
    """A tool in one conversation."""

    async def call(self, recipient: str, text: str) -> str:
        """What the model is answered. Raises ToolError; cancelling it ends what it does."""
        ...

    async def close(self) -> None:
        """Free all it holds."""
        ...


class Kit(Protocol):
    """A tool that was switched on."""

    name: str  # python, browser, apply_patch, or what an MCP server is called here

    @property
    def offer(self) -> Offer:
        """Known once it is started."""
        ...

    async def start(self) -> None:
        """Raises ToolUnavailable, before anybody relies on it."""
        ...

    def open(self) -> Opened:
        """For one conversation; costs nothing until the first call."""
        ...

    async def stop(self) -> None:
        """Free all it holds."""
        ...


def shortened(text: str, most: int) -> str:
    """``text`` without its middle, if it is too long for the model."""
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 3
    left = len(text) - head - tail
    return f"{text[:head]}\n... ({left} characters left out) ...\n{text[-tail:]}"
