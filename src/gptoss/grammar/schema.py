"""What users wrote, before any compiler sees it: sizes, keywords, endless schemas, special tokens.

A keyword that would be ignored is an error: a promise that is dropped in silence is none.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from gptoss.errors import GrammarError

MOST_BYTES = 256 << 10  # of a schema or a grammar
MOST_LEVELS = 100  # of braces and brackets; the compiler's own limit is 128
MOST_OPTIONAL = 400  # properties of one object; the compiler follows four states for each at once
SPACES = r"[ \t\r\n]{1,32}"  # between JSON tokens; more would let a model pad without end

# Keywords whose values are schemas: one, a list, or a dict of them.
ONE = {"additionalProperties", "items"}
LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
DICTS = {"$defs", "definitions", "patternProperties", "properties"}
HELD = {
    *("$ref", "const", "enum", "format", "type", "required", "pattern", "multipleOf"),
    *("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
NOTES = {
    *("$schema", "$id", "$comment", "title", "description", "default", "examples", "example"),
    *("deprecated", "readOnly", "writeOnly", "discriminator"),
}
KNOWN = ONE | LISTS | DICTS | HELD | NOTES

# Lark's strings, regexes and comments, as llguidance's lexer cuts them.
LITERAL = re.compile(
    r'"(?:\\(?:["\\/bfnrt]|u[a-fA-F0-9]{4})|[^"\\\x00-\x1f\x7f])*"'
    r"|/(?!/)(?:\\[^\n]|[^/\\])+/|(?:#|//)[^\n]*"
)
BEYOND = re.compile(
    r'["/<@]|%llguidance|\b(?:stop|max_tokens|temperature|stop_capture|capture)\s*='
)


def checked_schema(schema: object, where: str) -> object:
    """The schema as llguidance is to see it. Raises GrammarError with one sentence."""
    text = _json(schema, where)
    schema = json.loads(text)  # plain dicts, whatever Mapping it was
    if isinstance(schema, bool):
        schema = {} if schema else _refuse(where, "the schema false allows nothing")
    if not isinstance(schema, dict):
        _refuse(where, f"a schema is an object, not {type(schema).__name__}")
    for part in _parts(schema):
        if odd := [k for k in part if k not in KNOWN and not k.startswith("x-")]:
            _refuse(where, f"the keyword {odd[0][:40]!r} is none that can be held to")
        known = part.get("properties")
        if isinstance(known, dict) and len(known) - len(_list(part, "required")) > MOST_OPTIONAL:
            _refuse(where, f"an object has more than {MOST_OPTIONAL} optional properties")
    if _endless(schema):
        _refuse(where, "the schema never ends: a value would have to contain one of its own kind")
    ours = {"x-guidance": {"whitespace_pattern": SPACES}}
    return {key: value for key, value in schema.items() if key != "x-guidance"} | ours


def checked_regex(pattern: str, where: str) -> str:
    """A Lark grammar of one regex; it always matches the whole, anchors are taken for said."""
    _bounded(pattern, where)
    body = pattern.removeprefix("^")
    if body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2:
        body = body[:-1]
    body = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", body)
    return f"start: /{body}/" if body else 'start: ""'


def checked_lark(text: str, where: str) -> str:
    """A grammar that speaks of text alone: nothing in it can name a special token."""
    _bounded(text, where)
    if found := BEYOND.search(LITERAL.sub(" ", text)):
        _refuse(where, f"the grammar uses {found[0]!r} outside of strings and regular expressions")
    return text


def _json(schema: object, where: str) -> str:
    """Its text, if that is JSON of a bearable size; checked before anything recurses into it."""
    levels, layer = 0, [schema]
    while layer:
        if levels > MOST_LEVELS:
            _refuse(where, f"nested more than {MOST_LEVELS} levels deep")
        layer = [inner for value in layer for inner in _inner(value)]
        levels += 1
        if len(layer) > MOST_BYTES:
            _refuse(where, f"larger than {MOST_BYTES >> 10} KiB")
    try:
        text = json.dumps(schema, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        _refuse(where, f"not JSON ({error})")
    _bounded(text, where)
    return text


def _inner(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _bounded(text: str, where: str) -> None:
    if len(text.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        _refuse(where, f"larger than {MOST_BYTES >> 10} KiB")


def _refuse(where: str, reason: str) -> NoReturn:
    raise GrammarError(f"{where}: {reason}")


def _parts(schema: object) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it."""
    if not isinstance(schema, dict):
        return  # true, false, or what the compiler will complain about
    yield schema
    for key, value in schema.items():
        if key in ONE:
            yield from _parts(value)
        elif key in LISTS and isinstance(value, list):
            yield from (part for inner in value for part in _parts(inner))
        elif key in DICTS and isinstance(value, dict):
            yield from (part for inner in value.values() for part in _parts(inner))


def _endless(schema: dict[str, Any]) -> bool:
    """Whether every value has infinitely many parts: no end is reachable without a loop of $ref."""
    refs = {p["$ref"] for p in _parts(schema) if isinstance(p.get("$ref"), str)}
    ending: set[str] = {ref for ref in refs if _target(schema, ref) is None}  # compiler's complaint
    while more := {r for r in refs - ending if _ends(_target(schema, r), ending)}:
        ending |= more
    return not _ends(schema, ending)


def _ends(part: object, ending: set[str]) -> bool:
    """Whether some finite value fits, if the references in ``ending`` have one."""
    if not isinstance(part, dict) or "enum" in part or "const" in part:
        return True
    if isinstance(part.get("$ref"), str) and part["$ref"] not in ending:
        return False
    if not all(_ends(inner, ending) for inner in _list(part, "allOf")):
        return False
    for key in ("anyOf", "oneOf"):
        if _list(part, key) and not any(_ends(inner, ending) for inner in _list(part, key)):
            return False
    if part.get("type") == "object":
        properties = part.get("properties")
        known = properties if isinstance(properties, dict) else {}
        others = part.get("additionalProperties")
        needed = [name for name in _list(part, "required") if isinstance(name, str)]
        return all(_ends(known.get(name, others), ending) for name in needed)
    if part.get("type") == "array" and isinstance(least := part.get("minItems", 0), int):
        first = _list(part, "prefixItems")[:least]
        rest = [part.get("items")] if least > len(first) else []
        return all(_ends(item, ending) for item in first + rest)
    return True


def _list(part: dict[str, Any], key: str) -> list[Any]:
    value = part.get(key)
    return value if isinstance(value, list) else []


def _target(schema: object, ref: str) -> object:
    """What a reference within the schema names; None if there is no such place."""
    if not ref.startswith("#"):
        return None
    for step in ref[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict) and key in schema:
            schema = schema[key]
        elif isinstance(schema, list) and key.isdecimal() and int(key) < len(schema):
            schema = schema[int(key)]
        else:
            return None
    return schema
