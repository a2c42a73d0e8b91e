"""What somebody wants of an answer's form, and the dialects in which APIs say so.

Only shapes are checked here; whether a schema can be held is said by ``schema`` and ``table``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss.text.messages import Tool


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON value that the schema describes (draft 2020-12, as far as llguidance holds it)."""

    schema: Mapping[str, Any] | bool


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that the pattern matches as a whole: Rust's syntax, no lookaround."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Lark:
    """Text that a context-free grammar derives from its rule ``start``.

    The syntax is llguidance's dialect of Lark, without what reaches beyond text: special tokens,
    other grammars, token limits, and options of llguidance.
    """

    text: str


Format = JsonSchema | Regex | Lark
Choice = str  # none, auto, required, or "functions.NAME": this one must be called

ANY_OBJECT = JsonSchema({"type": "object"})


def as_format(said: Mapping[str, Any] | None) -> Format | None:
    """What ``response_format`` (chat) or ``text.format`` (responses) asks; None: any text.

    Types: text, json_object, json_schema, regex ({"pattern"}), and grammar ({"syntax": "lark" or
    "regex", "definition"}). Raises ValueError naming what is missing or unknown.
    """
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise ValueError(f"response_format: {type(said).__name__}, expected an object")
    match said.get("type"):
        case "text":
            return None
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            inner = said.get("json_schema", said)
            schema = inner.get("schema") if isinstance(inner, Mapping) else None
            if not isinstance(schema, Mapping | bool):
                raise ValueError("response_format: json_schema needs a schema, an object")
            return JsonSchema(schema)
        case "regex":
            return Regex(_text(said, "pattern"))
        case "grammar" if said.get("syntax") == "regex":
            return Regex(_text(said, "definition"))
        case "grammar" if said.get("syntax", "lark") == "lark":
            return Lark(_text(said, "definition"))
        case other:
            raise ValueError(
                f"response_format: type {str(other)[:40]!r} is none of text, json_object, "
                "json_schema, regex and grammar (of syntax lark or regex)"
            )


def as_choice(said: str | Mapping[str, Any] | None, tools: Sequence[Tool]) -> Choice:
    """``tool_choice`` of either API; None is "auto". Raises ValueError if it cannot be."""
    choice: object = "auto" if said is None else said
    if isinstance(said, Mapping):
        inner = said.get("function", said)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        choice = f"functions.{name}" if said.get("type") == "function" and name else said
    known = ["none", "auto", "required", *(f"functions.{tool.name}" for tool in tools)]
    if not isinstance(choice, str) or choice not in known:
        raise ValueError(f"tool_choice: {str(choice)[:80]!r} is none of {', '.join(known)[:400]}")
    return choice


def _text(said: Mapping[str, Any], key: str) -> str:
    value = said.get(key)
    if not isinstance(value, str):
        raise ValueError(f"response_format: {key} must be a string")
    return value
