"""A conversation as data: what harmony renders and what the parser gives back.

Nothing here knows a token. Field names follow the harmony format's own words
(https://cookbook.openai.com/articles/openai-harmony).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
Effort = Literal["low", "medium", "high"]
CHANNELS = ("analysis", "commentary", "final")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function the model may call."""

    name: str  # ^[A-Za-z0-9_-]{1,64}$
    description: str = ""
    parameters: Mapping[str, Any] | None = None  # a JSON schema of type object; None: no arguments
    strict: bool = False  # arguments must follow the parameters; see gptoss.grammar


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """The content of the system message. Defaults are the ones gpt-oss was trained with."""

    identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str | None = "2024-06"
    current_date: str | None = None  # YYYY-MM-DD; None leaves the line out
    effort: Effort = "medium"
    channels: Sequence[str] = CHANNELS
    builtin_tools: Sequence[Literal["browser", "python"]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Developer:
    """The content of the developer message: instructions and function tools."""

    instructions: str | None = None
    tools: Sequence[Tool] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message. ``content`` is text, or structured for system and developer messages."""

    role: Role
    content: "str | System | Developer"
    name: str | None = None  # author's name: "functions.get_weather" for a tool's answer
    channel: str | None = None  # analysis, commentary, final
    recipient: str | None = None  # "functions.get_weather" for a call; None means "all"
    content_type: str | None = None  # "json" as in <|constrain|>json; "code"; None means plain text
    repairs: Sequence[str] = field(default=())  # what the parser had to mend to read it
