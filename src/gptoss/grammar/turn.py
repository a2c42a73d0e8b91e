"""The turn that the model is to write, as grammars for llguidance.

The prompt ends in ``<|start|>assistant``. Behind it come thoughts, perhaps a word to the user on
commentary, and then a call or the final answer:

    [<|channel|>analysis<|message|>...<|end|><|start|>assistant]
    <|channel|>final<|message|>BODY<|return|>  or
    <|channel|>commentary to=functions.name <|constrain|>json<|message|>ARGUMENTS<|call|>

A content type stands behind a recipient and a space only, else OpenAI's parser takes it for one.
Everything here is trusted; what users wrote comes in as grammars of their own (see ``schema``).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss.grammar.formats import ANY_OBJECT, Choice, Format, JsonSchema, Lark, Regex
from gptoss.grammar.schema import checked_lark, checked_regex, checked_schema
from gptoss.text.messages import Tool
from gptoss.text.tools import WORD, plain

MOST_THOUGHTS = 4  # a model that may not answer yet would rather think again, without end
BUILTIN = {
    "browser": ("browser.search", "browser.open", "browser.find"),
    "python": ("python",),
}
NO_ARGUMENTS = JsonSchema({"type": "object", "additionalProperties": False})

HARMONY = """
thought: <|channel|> "analysis" <|message|> TEXT <|end|> again
aside: <|channel|> "commentary" <|message|> TEXT <|end|> again
again: <|start|> "assistant"
json: " " <|constrain|> "json"
code: " code"
anywhere: "analysis" | "commentary"
TEXT: /(?s:.+)/
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """Grammars as llguidance takes them; the first one is the turn, the others are bodies."""

    text: str  # JSON: {"grammars": [...]}
    bodies: tuple[str, ...]  # each that a user wrote, alone, in the same form


def turn(
    *,
    format: Format | None,
    tools: Sequence[Tool],
    choice: Choice,
    builtin: Sequence[str] = (),
) -> Turn | None:
    """The grammar of the next turn; None if nothing is asked that harmony itself does not.

    Raises:
        ValueError: a choice without the tool, a name that no header can have.
        GrammarError: a format or a tool's parameters that cannot be held.
    """
    _check(choice, tools, builtin)
    strict = choice != "none" and any(tool.strict for tool in tools)
    if format is None and not strict and (choice == "auto" or not (tools or builtin)):
        return None
    open_ = choice in ("auto", "required")
    offered = [tool for tool in tools if open_ or choice == f"functions.{tool.name}"]
    paths = [path for name in builtin if open_ for path in BUILTIN[name]]
    calls = [*_calls(offered), *_builtin_calls(paths)]
    bodies = {f"arguments-{i}": _arguments(tool) for i, tool in enumerate(offered)}
    final = None if choice not in ("none", "auto") else "TEXT" if format is None else "@final"
    if format is not None and final is not None:
        bodies["final"] = _body(format, "response_format")
    whole = {"lark_grammar": "\n".join(_rules(calls, final)) + HARMONY}
    named = [{"name": "turn", **whole}, *({"name": n, **body} for n, body in bodies.items())]
    trusted = (_body(ANY_OBJECT, ""), _body(NO_ARGUMENTS, ""))
    alone = (json.dumps({"grammars": [b]}) for b in bodies.values() if b not in trusted)
    return Turn(json.dumps({"grammars": named}), tuple(alone))


def _check(choice: Choice, tools: Sequence[Tool], builtin: Sequence[str]) -> None:
    if choice not in ("none", "auto", "required", *(f"functions.{t.name}" for t in tools)):
        raise ValueError(f"tool_choice: {choice!r}, but there is no such tool")
    if choice == "required" and not tools and not builtin:
        raise ValueError("tool_choice: required, but there are no tools")
    if odd := [name for name in builtin if name not in BUILTIN]:
        raise ValueError(f"builtin_tools: {odd[0]!r} is none of {', '.join(BUILTIN)}")


def _rules(calls: Sequence[str], final: str | None) -> Iterator[str]:
    """How the turn begins and ends; ``final`` is the body of its answer, None if none may come."""
    ends = " | ".join(["final"] * (final is not None) + ["call"] * bool(calls))
    yield f"start: thought{{0,{MOST_THOUGHTS}}} {'aside? ' if calls else ''}({ends})"
    if calls:
        yield "call: (" + "\n  | ".join(calls) + ") <|call|>"
    if final is not None:
        yield f'final: <|channel|> "final" <|message|> {final} <|return|>'


def _calls(tools: Sequence[Tool]) -> Iterator[str]:
    """Calls of functions, each with its own arguments; the recipient may stand in two places."""
    for i, tool in enumerate(tools):
        to = f" to=functions.{plain('tool name', tool.name, WORD)}"
        for header in (
            f'"{to}" <|channel|> "commentary"',
            f'<|channel|> "commentary{to}"',
        ):
            yield f"{header} json? <|message|> @arguments-{i}"


def _builtin_calls(recipients: Sequence[str]) -> Iterator[str]:
    """Calls of what the model knows from training; what they are told is free."""
    for name in recipients:
        to = f'" to={name}"'
        for header in (f"{to} <|channel|> anywhere", f"<|channel|> anywhere {to}"):
            yield f"{header} (code | json)? <|message|> TEXT"


def _arguments(tool: Tool) -> dict[str, Any]:
    """Strict: what the parameters say; else any JSON object."""
    where = f"parameters of {tool.name}"
    if not tool.strict:
        return _body(ANY_OBJECT, where)
    return _body(NO_ARGUMENTS if tool.parameters is None else JsonSchema(tool.parameters), where)


def _body(format: Format, where: str) -> dict[str, Any]:
    match format:
        case JsonSchema(schema):
            return {"json_schema": checked_schema(schema, where)}
        case Regex(pattern):
            return {"lark_grammar": checked_regex(pattern, where)}
        case Lark(text):
            return {"lark_grammar": checked_lark(text, where)}
