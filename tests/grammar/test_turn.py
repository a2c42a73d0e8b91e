"""A whole turn: which channels and calls may come, and that every parser reads them."""

import json

import jsonschema
import numpy as np
import pytest

from gptoss.errors import GrammarError
from gptoss.grammar import JsonSchema, Lark, Regex, as_choice, as_format, constrain
from gptoss.text.messages import Tool
from tests.grammar.conftest import babble, read

pytestmark = pytest.mark.usefixtures("untried")

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "<|end|>"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Tool(name="get_weather", parameters=CITY, strict=True)
CLOCK = Tool(name="clock", description="The time.")
LOOSE = Tool(name="loose", parameters=CITY)
TOOLS = (WEATHER, CLOCK, LOOSE)


def pushed(constraint, tokenizer, text):
    """The constraint behind ``text``; None if that is not allowed."""
    constraint = constraint.fork()
    for token in tokenizer.encode_with_specials(text):
        if not constraint.mask()[token]:
            return None
        constraint.accept(token)
    return constraint


def allows(constraint, tokenizer, text):
    return pushed(constraint, tokenizer, text) is not None


THOUGHT = "<|channel|>analysis<|message|>Well. {}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.%s <|constrain|>json<|message|>"
CALL_BEFORE = " to=functions.%s<|channel|>commentary <|constrain|>json<|message|>"


def test_nothing_asked_is_no_constraint(nano):
    assert constrain(nano) is None
    assert constrain(nano, tools=[CLOCK, LOOSE]) is None
    assert constrain(nano, choice="none") is None
    assert constrain(nano, builtin=["browser"]) is None


def test_a_format_holds_the_final_body_alone(nano):
    c = constrain(nano, format=JsonSchema(CITY))
    for before in ("", THOUGHT, THOUGHT * 2):
        assert allows(c, nano, before + FINAL + '{"city": "<|en')
        assert not allows(c, nano, before + FINAL + "Hello")
    done = pushed(c, nano, THOUGHT + FINAL + '{"city": "Bonn", "unit": "C"}<|return|>')
    assert done.ended
    assert np.flatnonzero(done.mask()).tolist() == [nano.special("<|endoftext|>")]
    assert not allows(c, nano, FINAL + '{"city": "Bonn"}<|end|>')
    assert not allows(c, nano, "<|channel|>commentary")  # there are no tools
    assert not allows(c, nano, " to=")
    assert not allows(c, nano, "Hello")  # no header at all


@pytest.mark.parametrize("name", ["<|end|>", "<|return|>", "<|channel|>", "<|call|>"])
def test_special_tokens_end_a_body_only_where_it_may_end(nano, name):
    c = pushed(constrain(nano, format=JsonSchema(CITY)), nano, FINAL + '{"city": "a')
    assert not c.mask()[nano.special(name)]
    assert pushed(c, nano, name.replace("<", "< ")) is not None
    for token in nano.encode(name):  # as text it is text
        assert c.mask()[token]
        c.accept(token)


def test_an_enum_of_special_text_stays_text(nano):
    schema = {"enum": ["<|end|>", "<|return|><|start|>user"]}
    c = pushed(constrain(nano, format=JsonSchema(schema)), nano, FINAL)
    seen = {json.loads(read(pushed_all(c, nano, s), nano)[0].content) for s in range(20)}
    assert seen == set(schema["enum"])


def pushed_all(c, nano, seed):
    """A babbled body, with its header before it."""
    return nano.encode_with_specials(FINAL) + babble(c.fork(), nano, seed)


@pytest.mark.parametrize("header", [CALL, CALL_BEFORE])
def test_choices(nano, header):
    weather, clock = header % "get_weather", header % "clock"
    by = {c: constrain(nano, tools=TOOLS, choice=c) for c in ("none", "auto", "required")}
    named = constrain(nano, tools=TOOLS, choice="functions.clock")
    for c in (*by.values(), named):
        assert allows(c, nano, THOUGHT)
        assert not allows(c, nano, header % "unknown")
    assert allows(by["none"], nano, FINAL + "Hi")
    assert not allows(by["none"], nano, header[:10])
    assert not allows(by["none"], nano, "<|channel|>commentary")
    assert allows(by["auto"], nano, FINAL + "Hi<|return|>")
    for c in (by["required"], named):
        assert not allows(c, nano, "<|channel|>final")
        assert not allows(c, nano, THOUGHT + "<|channel|>final")
    for c in (by["auto"], by["required"]):
        assert allows(c, nano, weather) and allows(c, nano, clock)
    assert allows(named, nano, clock + "{}<|call|>") and not allows(named, nano, weather)


def test_an_aside_may_come_once_and_leads_to_a_call(nano):
    aside = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
    c = constrain(nano, tools=TOOLS, choice="required")
    assert allows(c, nano, THOUGHT + aside + CALL % "clock")
    assert not allows(c, nano, aside + aside)


def test_thinking_ends(nano):
    c = constrain(nano, format=JsonSchema(CITY))
    assert allows(c, nano, THOUGHT * 4 + FINAL)
    assert not allows(c, nano, THOUGHT * 5)


def test_only_strict_tools_hold_their_parameters(nano):
    c = constrain(nano, tools=TOOLS, choice="required")
    assert not allows(c, nano, CALL % "get_weather" + '{"town"')
    assert allows(c, nano, CALL % "loose" + '{"town": 1}<|call|>')
    assert not allows(c, nano, CALL % "loose" + "Bonn")
    bare = Tool(name="bare", strict=True)
    c = constrain(nano, tools=[bare])
    assert allows(c, nano, CALL % "bare" + "{}<|call|>")
    assert not allows(c, nano, CALL % "bare" + '{"')


def test_builtin_tools(nano):
    c = constrain(nano, builtin=["browser", "python"], choice="required")
    assert allows(c, nano, "<|channel|>analysis to=python code<|message|>print(1)<|call|>")
    assert allows(c, nano, ' to=browser.search<|channel|>commentary<|message|>{"query"')
    assert not allows(c, nano, " to=browser.steal")
    c = constrain(nano, builtin=["browser"], choice="none")
    assert allows(c, nano, FINAL + "Hi<|return|>") and not allows(c, nano, " to=")
    with pytest.raises(ValueError, match="'shell' is none of browser, python"):
        constrain(nano, builtin=["shell"])
    with pytest.raises(ValueError, match="required, but there are no tools"):
        constrain(nano, choice="required")


@pytest.mark.parametrize(
    "format, good, bad",
    [
        (Regex(r"^a/b[0-9]+<\|end\|>$"), "a/b12<|end|>", "a/bx"),
        (Regex(r"a$|b\\$"), "a", "c"),
        (Lark('start: "<|return|>" X\nX: /[a-z\\/]{3}/  // "<|'), "<|return|>a/c", "<|end"),
        (Lark('start: list\nlist: "[" (list ("," list)*)? "]"'), "[[],[[]]]", "]"),
    ],
)
def test_regexes_and_grammars(nano, format, good, bad):
    c = pushed(constrain(nano, format=format), nano, FINAL)
    for token in nano.encode(good):
        assert c.mask()[token]
        c.accept(token)
    assert c.mask()[nano.special("<|return|>")]
    c = pushed(constrain(nano, format=format), nano, FINAL)
    with pytest.raises(ValueError, match="is not allowed here"):
        for token in [*nano.encode(bad), nano.special("<|return|>")]:
            c.accept(token)


def test_forks_do_not_know_each_other(nano):
    c = pushed(constrain(nano, format=JsonSchema(CITY)), nano, FINAL)
    before, fork = c.mask(), c.fork()
    fork.accept(nano.encode("{")[0])
    assert (c.mask() == before).all() and (fork.mask() != before).any()


def test_what_is_forced_is_what_must_come(nano):
    c = constrain(nano, tools=[WEATHER], choice="required")
    c = pushed(c, nano, CALL % "get_weather")
    assert nano.decode(c.forced()) == '{"city"'[: len(nano.decode(c.forced()))] != ""
    for token in c.forced():
        assert np.flatnonzero(c.mask()).tolist() == [token]
        c.accept(token)


def test_a_token_that_is_not_allowed_is_refused(nano):
    c = constrain(nano, format=JsonSchema(CITY))
    for token in (*nano.encode("x"), nano.special("<|call|>"), -1, nano.vocab_size):
        with pytest.raises(ValueError, match="is not allowed here"):
            c.fork().accept(token)


CASES = [
    {"format": JsonSchema(CITY)},
    {"tools": TOOLS, "choice": "auto"},
    {"tools": TOOLS, "choice": "auto", "format": JsonSchema(CITY)},
    {"tools": TOOLS, "choice": "required"},
    {"tools": TOOLS, "choice": "functions.get_weather", "format": JsonSchema(CITY)},
    {"tools": TOOLS, "choice": "none"},
    {"tools": (WEATHER,), "builtin": ("browser", "python")},
]


@pytest.mark.parametrize("asked", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("seed", range(8))
def test_any_allowed_turn_is_well_formed(nano, asked, seed):
    tools, choice = asked.get("tools", ()), asked.get("choice", "auto")
    *before, last = read(babble(constrain(nano, **asked), nano, seed), nano, tools)
    assert all(m.channel in ("analysis", "commentary") and m.recipient is None for m in before)
    judge(last, tools, asked.get("format"))
    if choice == "none":
        assert last.channel == "final"
    elif choice != "auto":
        assert last.recipient and choice in ("required", last.recipient)


def judge(last, tools, format):
    """A final answer or call as it was asked for."""
    if last.recipient is None:
        assert last.channel == "final"
        if format is not None:
            jsonschema.validate(json.loads(last.content), format.schema)
    elif last.recipient.startswith("functions."):
        [tool] = [t for t in tools if f"functions.{t.name}" == last.recipient]
        arguments = json.loads(last.content)
        assert isinstance(arguments, dict)
        if tool.strict:
            jsonschema.validate(arguments, tool.parameters)


# --- gpt-oss's own vocabulary, and OpenAI's own parser


@pytest.mark.parametrize("asked", CASES, ids=range(len(CASES)))
def test_openai_reads_the_same_turn(tokenizer, harmony, asked):
    from openai_harmony import Role

    tools = asked.get("tools", ())
    for seed in range(2):
        tokens = babble(constrain(tokenizer, **asked), tokenizer, seed, patience=25)
        ours = read(tokens, tokenizer, tools)
        judge(ours[-1], tools, asked.get("format"))
        theirs = harmony.parse_messages_from_completion_tokens(tokens, Role.ASSISTANT, strict=True)
        assert [(m.channel, m.recipient, m.content[0].text) for m in theirs] == [
            (m.channel, m.recipient, m.content) for m in ours
        ]


def test_reserved_tokens_are_never_allowed(tokenizer):
    c = pushed(constrain(tokenizer, format=JsonSchema(CITY)), tokenizer, THOUGHT[:33])
    allowed = np.flatnonzero(c.mask())
    assert allowed.size > 190_000
    assert [i for i in allowed if tokenizer.is_special(i)] == [tokenizer.special("<|end|>")]


# --- what APIs say


def test_formats_of_both_apis():
    assert as_format(None) is as_format({"type": "text"}) is None
    assert as_format({"type": "json_object"}) == JsonSchema({"type": "object"})
    chat = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY, "strict": True}}
    assert as_format(chat) == as_format({"type": "json_schema", "schema": CITY}) == JsonSchema(CITY)
    assert as_format({"type": "regex", "pattern": "a"}) == Regex("a")
    assert as_format({"type": "grammar", "syntax": "regex", "definition": "a"}) == Regex("a")
    assert as_format({"type": "grammar", "syntax": "lark", "definition": "b"}) == Lark("b")
    for bad in ("json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "regex"}):
        with pytest.raises(ValueError, match="response_format"):
            as_format(bad)


def test_choices_of_both_apis():
    assert as_choice(None, TOOLS) == "auto" and as_choice("required", TOOLS) == "required"
    for said in ({"function": {"name": "clock"}}, {"name": "clock"}):
        assert as_choice({"type": "function", **said}, TOOLS) == "functions.clock"
    for bad in ("any", {"type": "function", "name": "x"}, {"type": "function"}, 3):
        with pytest.raises(ValueError, match="tool_choice"):
            as_choice(bad, TOOLS)
    with pytest.raises(ValueError, match="no such tool"):
        constrain(None, tools=TOOLS, choice="functions.x")


def test_a_name_cannot_forge_a_header(nano):
    with pytest.raises(ValueError, match="tool name"):
        constrain(nano, tools=[Tool(name='a" <|return|> "')], choice="required")


def test_faults_are_remembered_too(nano):
    for _ in range(2):
        with pytest.raises(GrammarError, match="Invalid type"):
            constrain(nano, format=JsonSchema({"type": "strin"}))
