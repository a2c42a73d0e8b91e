"""Schemas that can be held are held; of others one sentence says why not."""

import json
import string

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.errors import GrammarError
from gptoss.grammar import JsonSchema, Lark, Regex, constrain, constraint
from gptoss.text.messages import Tool
from tests.grammar.conftest import babble, read

NAMES = st.sampled_from(["a", "b c", "<|end|>", "ключ", 'quo"te', "type", "$ref"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 10**6), st.text(string.printable, max_size=6)
)


def ranges(low, high, numbers):
    pairs = st.tuples(numbers, numbers).map(sorted)
    return pairs.map(lambda p: {low: p[0], high: p[1]})


def with_type(kind, *optional):
    """A schema of that type with some of the optional keywords."""
    return st.tuples(*(st.one_of(st.just({}), o) for o in optional)).map(
        lambda parts: {"type": kind} | {k: v for part in parts for k, v in part.items()}
    )


def objects(inner):
    properties = st.dictionaries(NAMES, inner, max_size=4)
    others = st.one_of(st.booleans(), inner)

    def settle(drawn):
        known, needed, other = drawn
        required = [name for i, name in enumerate(known) if needed[i]]
        return {
            "type": "object",
            "properties": known,
            "required": required,
            "additionalProperties": other,
        }

    bits = st.lists(st.booleans(), min_size=4, max_size=4)
    return st.tuples(properties, bits, others).map(settle)


def arrays(inner):
    return st.one_of(
        with_type(
            "array",
            inner.map(lambda s: {"items": s}),
            ranges("minItems", "maxItems", st.integers(0, 3)),
        ),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda items: {
                "type": "array",
                "prefixItems": items,
                "items": False,
                "minItems": len(items),
            }
        ),
    )


LEAVES = st.one_of(
    st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}]),
    with_type("string", ranges("minLength", "maxLength", st.integers(0, 9))),
    st.sampled_from(["^[a-z]{1,4}$", "^ab+c$", "^(x|yy)*z", r"^\d{4}-\d\d$", "[<|>]"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    with_type("integer", ranges("minimum", "maximum", st.integers(-2000, 2000))),
    st.integers(1, 50).map(lambda n: {"type": "integer", "multipleOf": n}),
    with_type("number", ranges("minimum", "maximum", st.integers(-50, 50))),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
    ),
    max_leaves=8,
)


@pytest.mark.usefixtures("untried")
class TestHeld:
    @settings(max_examples=40)
    @given(schema=SCHEMAS, seed=st.integers(0, 2**32 - 1), call=st.booleans())
    def test_whatever_is_drawn_validates(self, nano, schema, seed, call):
        jsonschema.Draft202012Validator.check_schema(schema)
        tools = [Tool(name="f", parameters=schema, strict=True)] if call else []
        asked = {"choice": "required"} if call else {"format": JsonSchema(schema)}
        turn = babble(constrain(nano, tools=tools, **asked), nano, seed)
        last = read(turn, nano, tools)[-1]
        assert last.recipient == ("functions.f" if call else None)
        jsonschema.Draft202012Validator(schema).validate(json.loads(last.content))

    def test_references_and_recursion(self, nano):
        tree = {
            "$defs": {
                "tree": {
                    "type": "object",
                    "properties": {
                        "leaf": {"type": "integer"},
                        "twigs": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                    },
                    "required": ["leaf"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/tree",
        }
        for seed in range(10):
            last = read(babble(constrain(nano, format=JsonSchema(tree)), nano, seed), nano)[-1]
            jsonschema.validate(json.loads(last.content), tree)

    def test_as_many_optional_properties_as_are_let_through(self, nano):
        properties = {f"p{i}": {"type": "integer"} for i in range(400)}
        schema = {"type": "object", "properties": properties, "additionalProperties": False}
        last = read(babble(constrain(nano, format=JsonSchema(schema)), nano), nano)[-1]
        jsonschema.validate(json.loads(last.content), schema)

    def test_a_schema_cannot_loosen_its_own_reading(self, nano):
        """llguidance would take options from the schema."""
        lenient = {"x-guidance": {"lenient": True}, "type": "string", "format": "none-such"}
        with pytest.raises(GrammarError, match="Unknown format"):
            constrain(nano, format=JsonSchema(lenient))


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
EITHER = {"anyOf": [{"properties": {name: {}}} for name in "abcdefgh"]}
FAULTS = {
    "contradiction": ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
    "nothing": ({"enum": []}, "Unsatisfiable"),
    "false": (False, "allows nothing"),
    "no schema": ([], "not list"),
    "no type": ({"type": "strin"}, "Invalid type: strin"),
    "typo": ({"type": "object", "requird": ["a"]}, "'requird'"),
    "typo inside": ({"anyOf": [{"items": {"maxItem": 3}}]}, "'maxItem'"),
    "not held": ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    "nothing but itself": ({"$ref": "#"}, "never ends"),
    "loop": (LOOP, "never ends"),
    "needs itself": (
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        "never ends",
    ),
    "list of itself": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "never ends"),
    "no such place": ({"$ref": "#/$defs/none"}, "does not exist"),
    "elsewhere": ({"$ref": "file:///etc/passwd"}, "not present"),
    "deep": (deep(2000), "levels deep"),
    "wide": ({"enum": ["x" * 300_000]}, "larger than 256 KiB"),
    "many": ({"enum": list(range(300_000))}, "larger than 256 KiB"),
    "NaN": ({"minimum": float("nan")}, "not JSON"),
    "object": ({"const": object()}, "not JSON"),
    "regex": ({"type": "string", "pattern": "("}, "unclosed group"),
    "lookahead": ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    "too many properties": (
        {"type": "object", "properties": {f"p{i}": {} for i in range(401)}},
        "more than 400 optional properties",
    ),
    "too many choices": ({"allOf": [EITHER] * 6}, "schema too large"),
}


def said(raised):
    """The message, which is one sentence."""
    text = str(raised.value)
    assert "\n" not in text and len(text) < 400 and "Traceback" not in text, text
    return text


@pytest.mark.usefixtures("untried")
class TestRefused:
    @pytest.mark.parametrize("name", FAULTS)
    def test_what_cannot_be_held_is_said(self, nano, name):
        schema, reason = FAULTS[name]
        with pytest.raises(GrammarError) as raised:
            constrain(nano, format=JsonSchema(schema))
        assert reason in said(raised)
        with pytest.raises(GrammarError) as raised:
            constrain(nano, tools=[Tool(name="f", parameters=schema, strict=True)])
        assert reason in said(raised)

    @pytest.mark.parametrize(
        "text",
        [
            "start: <|end|>",
            "start: <[200007]>",
            'start: "a" <[*]>',
            'start: /a/ <|end|> "/"',
            'start: "a" // "\n  <|end|>',
            "start: @turn",
            "start: @{ start: X @}",
            "%llguidance {}\nstart: X",
            'start[stop=""]: /.*/',
            'start[max_tokens=3]: "a"',
            'start: "\x7f" <|end|> "',
        ],
    )
    def test_a_grammar_speaks_of_text_alone(self, nano, text):
        with pytest.raises(GrammarError, match="outside of strings") as raised:
            constrain(nano, format=Lark(text))
        said(raised)

    @pytest.mark.parametrize(
        "format, reason",
        [
            (Lark("start: nothing"), "nothing"),
            (Lark("foo: X"), ""),
            (Lark("start: ((("), ""),
            (Lark('start: "' + "x" * 300_000 + '"'), "larger"),
            (Regex("("), "unclosed group"),
            (Regex("a\\"), ""),
            (Regex(r"(a)\1"), "backreferences"),
        ],
    )
    def test_grammars_and_regexes_that_do_not_compile(self, nano, format, reason):
        with pytest.raises(GrammarError) as raised:
            constrain(nano, format=format)
        assert reason in said(raised)

    def test_faults_and_grammars_are_remembered_up_to_a_number(self, nano, monkeypatch):
        monkeypatch.setattr(constraint, "REMEMBERED", 3)
        table = constraint.Table(nano)
        monkeypatch.setattr(constraint, "prepare", lambda tokenizer: table)
        for i in range(9):
            constrain(nano, format=Regex(f"a{i}"))
        assert len(table._compiled) == 3
