"""Tools as gpt-oss reads them: namespaces of functions with TypeScript-like types.

The model was trained on exactly this text, so it equals OpenAI's renderer (openai-harmony 0.0.8) to
the character: what that leaves out of a schema (anyOf, const, bounds) is left out here too.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptoss.text.messages import Tool

WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
PATH = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64})*")


def plain(field: str, value: str, pattern: re.Pattern[str]) -> str:
    """``value`` if it is a WORD or a PATH, so that no name can forge a header; else ValueError."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(
            f"{field}: {str(value)[:80]!r} is no name; expected letters, digits, _ and -, at most "
            "64" + (" in each of the parts joined by dots" if pattern is PATH else "")
        )
    return value


def builtin(name: str) -> str:
    """The section of a tool the model knows from training: browser or python."""
    match name:
        case "browser":
            return namespace("browser", _BROWSER, _BROWSER_TOOLS)
        case "python":
            return f"## python\n\n{_PYTHON}"
        case _:
            raise ValueError(f"builtin_tools: {name!r} is neither browser nor python")


def namespace(name: str, description: str, tools: Sequence[Tool]) -> str:
    """The section of a namespace: its description and its functions as types."""
    lines = [f"## {name}\n", *_comment(description), f"namespace {name} {{\n"]
    for tool in tools:
        lines += _comment(tool.description)
        signature = "" if tool.parameters is None else f"_: {_arguments(tool)}"
        lines.append(f"type {plain('tool name', tool.name, WORD)} = ({signature}) => any;\n")
    return "\n".join([*lines, f"}} // namespace {name}"])


def _comment(text: str) -> list[str]:
    lines = re.split(r"\r?\n", text)
    return [f"// {line}" for line in (lines if lines[-1] else lines[:-1])]


def _arguments(tool: Tool) -> str:
    try:
        return _type(tool.parameters, "")
    except RecursionError:
        raise ValueError(f"parameters of {tool.name}: nested too deeply") from None


def _get(schema: object, key: str) -> Any:
    return schema.get(key) if isinstance(schema, Mapping) else None


def _has(schema: object, key: str) -> bool:
    return isinstance(schema, Mapping) and key in schema


def _list(schema: object, key: str) -> list[Any] | None:
    value = _get(schema, key)
    return list(value) if isinstance(value, list | tuple) else None


def _text(schema: object, key: str) -> str | None:
    value = _get(schema, key)
    return value if isinstance(value, str) else None


def _type(schema: object, indent: str) -> str:
    """A JSON schema as a type whose lines start at ``indent``; what is not known is ``any``."""
    variants = _list(schema, "oneOf")
    if variants is not None:
        return "".join(f"\n{indent} | {_variant(v, indent)}" for v in variants)
    if names := [name for name in _list(schema, "type") or () if isinstance(name, str)]:
        return " | ".join("number" if name == "integer" else name for name in names)
    match _get(schema, "type"):
        case "object":
            return _object(schema, indent)
        case "array":
            if not _has(schema, "items"):
                return "Array<any>"
            return _type(_get(schema, "items"), indent) + "[]"
        case "string":
            values = [v for v in _list(schema, "enum") or () if isinstance(v, str)]
            return " | ".join(f'"{value}"' for value in values) or "string"
        case "number" | "integer":
            return "number"
        case "boolean":
            return "boolean"
        case _:
            return "any"


def _nullable(schema: object, indent: str) -> str:
    kind = _type(schema, indent)
    return f"{kind} | null" if _get(schema, "nullable") is True and "null" not in kind else kind


def _variant(schema: object, indent: str) -> str:
    notes = [note for note in [_text(schema, "description")] if note is not None]
    if _has(schema, "default"):
        # Unlike in a property, an enum's default is written as JSON here.
        json_text = f"default: {_json(_get(schema, 'default'))}"
        notes.append(json_text if _list(schema, "enum") else _default(schema))
    return _nullable(schema, indent + "   ") + (" // " + " ".join(notes) if notes else "")


def _default(schema: object) -> str:
    value = _get(schema, "default")
    if not isinstance(value, str):
        return f"default: {_json(value)}"
    return f"default: {value}" if _list(schema, "enum") else f'default: "{value}"'


def _object(schema: object, indent: str) -> str:
    description = _text(schema, "description")
    lines = [] if description is None else [f"{indent}// {description}\n"]
    lines.append("{\n")
    properties = _get(schema, "properties")
    required = [name for name in _list(schema, "required") or () if isinstance(name, str)]
    for key, value in properties.items() if isinstance(properties, Mapping) else ():
        name = key if key in required else f"{key}?"
        lines += [f"{indent}{line}\n" for line in _property(name, value, indent)]
    return "".join([*lines, f"{indent}}}"])


def _property(name: str, schema: object, indent: str) -> Iterator[str]:
    """The lines of one property, without their indent."""
    if (title := _text(schema, "title")) is not None:
        yield f"// {title}"
        yield "//"
    description = _text(schema, "description")
    union = _has(schema, "oneOf")
    if description is not None and not union:
        yield f"// {description}"
    if examples := _list(schema, "examples"):
        yield "// Examples:"
        yield from (f'// - "{example}"' for example in examples if isinstance(example, str))
    variants = _list(schema, "oneOf")
    if variants is not None:
        yield from _union(name, schema, variants, indent)
        return
    note = f" // {_default(schema)}" if _has(schema, "default") and not union else ""
    yield f"{name}: {_nullable(schema, indent + '    ')},{note}"


def _union(name: str, schema: object, variants: list[Any], indent: str) -> Iterator[str]:
    description = _text(schema, "description")
    above = description is not None and not (
        variants and _text(variants[0], "description") == description
    )
    if above:
        yield f"// {description}"
    if _has(schema, "default"):
        yield f"// {_default(schema)}"
    yield f"{name}:"
    for i, variant in enumerate(variants):
        notes = []
        own = _text(variant, "description")
        if own is not None and own != description and not (i == 0 and above):
            notes.append(own)
        if _has(variant, "default"):
            notes.append(_default(variant))
        comment = " // " + " ".join(notes) if notes else ""
        yield f" | {_nullable(variant, indent + '   ')}{comment}"
    yield ","


def _json(value: object) -> str:
    """Compact JSON as Rust's serde writes it; only floats differ from Python's."""
    match value:
        case float():
            return _float(value)
        case list() | tuple():
            return "[" + ",".join(map(_json, value)) + "]"
        case Mapping():
            return "{" + ",".join(f"{_json(k)}:{_json(v)}" for k, v in value.items()) + "}"
        case int() if not isinstance(value, bool) and not -(2**63) <= value < 2**64:
            return _float(float(value))
        case _:
            return json.dumps(value, ensure_ascii=False)


def _float(value: float) -> str:
    """The shortest digits; an exponent without plus or padding, below 1e-5 and from 1e16 on."""
    if value in (float("inf"), float("-inf")) or value != value:
        raise ValueError(f"parameters: {value} is no JSON number")
    digits, _, exponent = repr(value).partition("e")
    if exponent == "-05":
        sign, digits = ("-", digits[1:]) if digits[0] == "-" else ("", digits)
        return f"{sign}0.0000{digits.replace('.', '')}"
    return f"{digits}e{int(exponent)}" if exponent else digits


_PYTHON = (
    "Use this tool to execute Python code in your chain of thought. The code will not be shown to "
    "the user. This tool should be used for internal reasoning, but not for code that is intended "
    "to be visible to the user (e.g. when creating plots, tables, or files).\n\n"
    "When you send a message containing Python code to python, it will be executed in a stateful "
    "Jupyter notebook environment. python will respond with the output of the execution or time "
    "out after 120.0 seconds. The drive at '/mnt/data' can be used to save and persist user files. "
    "Internet access for this session is UNKNOWN. Depends on the cluster."
)
_BROWSER = """\
Tool for browsing.
The `cursor` appears in brackets before each browsing display: `[{cursor}]`.
Cite information from the tool using the following format:
`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.
Do not quote more than 10 words directly from the tool output.
sources=web (default: web)"""
_TEXT, _COUNT = {"type": "string"}, {"type": "number", "default": -1}
_BROWSER_TOOLS = (
    Tool(
        name="search",
        description="Searches for information related to `query` and displays `topn` results.",
        parameters={
            "type": "object",
            "properties": {
                "query": _TEXT,
                "topn": {"type": "number", "default": 10},
                "source": _TEXT,
            },
            "required": ["query"],
        },
    ),
    Tool(
        name="open",
        description=(
            "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`,"
            " showing `num_lines` lines.\n"
            "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
            "If `cursor` is not provided, the most recent page is implied.\n"
            "If `id` is a string, it is treated as a fully qualified URL associated with `source`."
            "\nIf `loc` is not provided, the viewport will be positioned at the beginning of the "
            "document or centered on the most relevant passage, if available.\n"
            "Use this function without `id` to scroll to a new location of an opened page."
        ),
        parameters={
            "type": "object",
            "properties": {
                "id": {"type": ["number", "string"], "default": -1},
                "cursor": _COUNT,
                "loc": _COUNT,
                "num_lines": _COUNT,
                "view_source": {"type": "boolean", "default": False},
                "source": _TEXT,
            },
        },
    ),
    Tool(
        name="find",
        description=(
            "Finds exact matches of `pattern` in the current page, or the page given by `cursor`."
        ),
        parameters={
            "type": "object",
            "properties": {"pattern": _TEXT, "cursor": _COUNT},
            "required": ["pattern"],
        },
    ),
)
