import random
import re
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.text.harmony import render
from gptoss.text.header import MAX_HEADER
from gptoss.text.messages import Message
from gptoss.text.parser import Delta, MessageEnd, Parser, Repair, parse
from tests.text.irregular import CASES, TOOLS

STRUCTURE = ("start", "channel", "constrain", "message", "end", "return", "call", "endoftext")
STRUCTURE += ("startoftext",)
HI = "<|channel|>final<|message|>Hi"


def encode(text, tokenizer):
    """Text with special tokens; ⟦channel⟧ becomes the special token's spelling."""
    tokens = []
    for part in re.split(r"(<\|\w+\|>)", text):
        special = tokenizer.specials.get(part)
        spelled = re.sub("⟦(.*?)⟧", r"<|\1|>", part)
        tokens += tokenizer.encode(spelled) if special is None else [special]
    return tokens


def text_of(tokens, tokenizer):
    """The bytes that a parser must account for."""
    ordinary = min(tokenizer.specials.values())  # in both vocabularies ordinary ids come first
    return tokenizer.decode_bytes(t for t in tokens if 0 <= t < ordinary)


def checked(tokens, tokenizer, role="assistant", tools=TOOLS):
    """A finished parser, after checking every promise that one stream can show."""
    parser, events = Parser(tokenizer, role, tools), []
    for token in tokens:
        events += parser.push(token)
    events += parser.finish()
    before = (list(parser.messages), parser.records, parser.tail, parser.repairs)
    assert parser.finish() == [], "a second finish spoke"
    assert before == (parser.messages, parser.records, parser.tail, parser.repairs)

    recorded = b"".join(r.header + r.content for r in parser.records) + parser.tail
    assert recorded == text_of(tokens, tokenizer), "bytes were lost or invented"
    assert len(parser.records) == len(parser.messages)
    for record, message in zip(parser.records, parser.messages, strict=True):
        assert message.content == record.content.decode("utf-8", "replace")
        assert record.content or Repair.EMPTY in message.repairs
        assert record.content or record.header, "a message made of structure alone"
        assert len(set(message.repairs)) == len(message.repairs)

    streamed = {i: list(group) for i, group in groupby(events, lambda e: e.message_index)}
    assert list(streamed) == list(range(len(parser.messages))), "messages are streamed in order"
    for i, message in enumerate(parser.messages):
        *deltas, end = streamed[i]
        assert end == MessageEnd(i, message)
        assert "".join(d.text for d in deltas) == message.content
        head = (message.role, message.channel, message.recipient)
        assert all(d.text and (d.role, d.channel, d.recipient) == head for d in deltas)
    return parser


def shown(messages):
    return [
        (m.role, m.name, m.channel, m.recipient, m.content_type, m.content, tuple(m.repairs))
        for m in messages
    ]


# --- irregular output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.about)
@pytest.mark.parametrize("vocabulary", ["tokenizer", "nano"])
def test_irregular_output_is_mended_and_reported(case, vocabulary, request):
    tokenizer = request.getfixturevalue(vocabulary)
    parser = checked(encode(case.stream, tokenizer), tokenizer)
    assert shown(parser.messages) == shown(case.messages)
    in_messages = [r for m in case.messages for r in m.repairs]
    assert parser.repairs == in_messages + case.loose
    assert parser.tail.decode() == case.tail


def test_the_corpus_shows_every_repair():
    shown = {r for c in CASES for r in [*c.loose, *(r for m in c.messages for r in m.repairs)]}
    assert set(Repair) - shown == {Repair.TWO_TYPES, Repair.BAD_UTF8}  # each has its own test


@pytest.mark.parametrize(
    ("header", "recipient", "kind"),
    [
        (" to=functions.ping<|channel|>commentary <|constrain|>json", "functions.ping", "json"),
        ("<|channel|>commentary to=functions.ping <|constrain|>json", "functions.ping", "json"),
        ("<|channel|>commentary to=functions.ping<|constrain|>json", "functions.ping", "json"),
        ("<|channel|>analysis to=python code", "python", "code"),
        ("<|channel|>analysis to=browser.search", "browser.search", None),
        ("<|channel|>commentary", None, None),
    ],
)
def test_well_formed_headers_need_no_repair(nano, header, recipient, kind):
    [message] = checked(encode(header + "<|message|>{}<|call|>", nano), nano).messages
    assert (message.recipient, message.content_type, message.repairs) == (recipient, kind, ())


def test_of_two_types_the_last_one_counts(nano):
    header = "<|channel|>commentary to=functions.ping <|constrain|>xml <|constrain|>json"
    [message] = checked(encode(header + "<|message|>{}<|call|>", nano), nano).messages
    assert (message.content_type, message.repairs) == ("json", (Repair.TWO_TYPES,))


def test_the_longest_known_name_is_unglued(nano):
    tokens = encode("<|channel|>commentary to=functions.pingfinaljson<|message|>{}<|call|>", nano)
    [message] = checked(tokens, nano, tools=["ping", "pingfinal", "pingf"]).messages
    assert (message.recipient, message.content_type) == ("functions.pingfinal", "json")


@pytest.mark.parametrize(
    ("stream", "stop"),
    [
        (HI + "<|return|>", "return"),
        (HI + "<|end|>", "end"),
        (HI + "<|end|><|return|>", "return"),
        (HI + "<|return|>\n", "return"),
        (HI + "<|endoftext|>", "endoftext"),
        ("<|channel|>commentary to=functions.ping<|message|>{}<|call|>", "call"),
        (HI, None),
        (HI + "<|return|>more", None),
        ("", None),
    ],
)
def test_stop_tells_how_the_turn_ended(nano, stream, stop):
    assert checked(encode(stream, nano), nano).stop == stop


# --- streaming


def test_prose_is_streamed_before_it_ends(nano):
    parser = Parser(nano)
    prose = b"I am sorry, but I really cannot help with that."
    first = next(i for i, byte in enumerate(prose) if parser.push(byte))
    assert prose[:first] == b"I am sorry, but I really "  # then the seventh word begins


@pytest.mark.parametrize("prefix", ["", "<|channel|>", "<|channel|>final ", " to="])
def test_no_header_holds_text_back_forever(nano, prefix):
    parser = Parser(nano)
    tokens = encode(prefix + "x" * MAX_HEADER, nano)
    events = [e for token in tokens for e in parser.push(token)]
    assert events or prefix == " to=", "still buffering"
    assert parser.push(ord("y"))[-1].text == "y"


def test_a_character_split_between_tokens_is_one_delta(nano):
    parser = Parser(nano)
    parser_events = [e for t in encode(HI[:-2] + "é😀", nano) for e in parser.push(t)]
    assert [e.text for e in parser_events] == ["é", "😀"]


def test_bytes_that_are_no_text_are_replaced_and_recorded(nano):
    tokens = [*encode(HI, nano), 0xFF, 0xC3, nano.special("<|return|>")]
    parser = checked(tokens, nano)
    assert parser.messages[0].content == "Hi\ufffd\ufffd"
    assert parser.messages[0].repairs == (Repair.BAD_UTF8,)
    assert parser.records[0].content == b"Hi\xff\xc3"


def test_ids_without_a_token_are_dropped_and_reported(tokenizer):
    ids = [-1, 200_000, 200_500, 201_087, 201_088, 2**40, -(2**70)]
    [message] = checked([*encode(HI, tokenizer), *ids], tokenizer).messages
    assert message.content == "Hi"
    assert message.repairs == (Repair.STRAY_TOKEN, Repair.CUT)


@pytest.mark.parametrize("name", STRUCTURE)
@pytest.mark.parametrize("role", ["assistant", None])
def test_noise_leaves_no_trace_in_memory(nano, name, role):
    parser = Parser(nano, role)
    start, channel = nano.special("<|start|>"), nano.special("<|channel|>")
    for unit in ([nano.special(f"<|{name}|>")], [start, nano.special(f"<|{name}|>"), channel]):
        for _ in range(500):
            for token in unit:
                assert parser.push(token) == []
    assert len(parser.repairs) <= len(Repair)
    assert parser._header is None or len(parser._header.marks) < 3
    assert parser.finish() == parser.messages == []
    assert parser.tail == b""


# --- every stream


WORDS = [
    *("Hello", " there,", " assistant", "final", " analysis", "commentary", "json", " code"),
    *(" to=functions.get_weather", " to=ping", "to=", "functions.ping", "user", "tool", " is"),
    *('{"city":"Oslo"}', "{}", "<|channel|>", "<|message|>"),
    *("\n", " é", "漢字", "😀", "\ufffd", " \t ", ",", ".", " "),
]
HEADERS = ["analysis", "commentary", "final", None]


def conversation(rng):
    """A random one, as ``render`` takes it."""
    text = lambda: "".join(rng.choices(WORDS, k=rng.randrange(1, 9)))  # noqa: E731
    messages = []
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(6)
        if kind == 0:
            messages.append(Message(role="user", content=text()))
        elif kind == 1:
            name, to = "functions.get_weather", "assistant"
            tool = Message(
                role="tool", name=name, recipient=to, channel="commentary", content=text()
            )
            messages.append(tool)
        elif kind == 2:
            to, kind = rng.choice(
                [("functions.ping", "json"), ("python", "code"), ("browser.open", None)]
            )
            channel = "commentary" if to == "functions.ping" else "analysis"
            call = Message(
                role="assistant", content=text(), channel=channel, recipient=to, content_type=kind
            )
            messages.append(call)
        else:
            channel = rng.choice(HEADERS[:3])
            messages.append(Message(role="assistant", content=text(), channel=channel))
    return messages


def mutated(tokens, rng, tokenizer):
    """The stream with a few tokens deleted, inserted, doubled, swapped, or its end cut off."""
    tokens = list(tokens)
    structure = [tokenizer.special(f"<|{name}|>") for name in STRUCTURE]
    for _ in range(rng.choice([0, 1, 1, 2, 3, 8])):
        i, j = rng.randrange(len(tokens) + 1), rng.randrange(len(tokens) + 1)
        marks = [k for k, token in enumerate(tokens) if token in structure]
        if marks and rng.random() < 0.6:
            i = rng.choice(marks)
        match rng.randrange(7):
            case 0:
                del tokens[i : i + 1]
            case 1:
                tokens.insert(i, rng.choice(structure))
            case 2:
                tokens.insert(i, rng.choice([-1, rng.randrange(300), rng.randrange(201_200)]))
            case 3:
                tokens[i:i] = tokens[i : i + 1]
            case 4 if max(i, j) < len(tokens):
                tokens[i], tokens[j] = tokens[j], tokens[i]
            case 5:
                tokens[i:i] = tokenizer.encode(rng.choice(WORDS))
            case 6:
                del tokens[j if rng.random() < 0.3 else len(tokens) :]
    return tokens


def streams(count, seed, tokenizer, roles=("assistant", None)):
    """Random streams: rendered conversations, whole and mutated, and mere noise."""
    rng = random.Random(seed)
    structure = [tokenizer.special(f"<|{name}|>") for name in STRUCTURE]
    for i in range(count):
        role = rng.choice(roles)
        if i % 8:
            tokens = render(conversation(rng), tokenizer, keep_analysis=True)
            skip = 2 if role and rng.random() < 0.9 else 0  # <|start|>, assistant
            yield role, mutated(tokens[skip:], rng, tokenizer)
        else:
            size = rng.randrange(25)
            words = [rng.choice(tokenizer.encode(rng.choice(WORDS))) for _ in range(size)]
            noise = [(rng.choice(structure), word, rng.randrange(201_200)) for word in words]
            yield role, [rng.choice(three) for three in noise]


def as_bytes(tokens, tokenizer, nano):
    """The same stream in a vocabulary of single bytes."""
    structure = {tokenizer.special(f"<|{n}|>"): nano.special(f"<|{n}|>") for n in STRUCTURE}
    out = []
    for token in tokens:
        text = text_of([token], tokenizer)
        out += text or [structure.get(token, -1)]
    return out


@pytest.mark.parametrize("seed", range(8))
def test_20_000_random_and_mutated_streams_keep_every_promise(tokenizer, nano, seed):
    for i, (role, tokens) in enumerate(streams(2_500, seed, tokenizer)):
        parser = checked(tokens, tokenizer, role)
        if i % 4 == 0:  # cut into other tokens, the same
            other = checked(as_bytes(tokens, tokenizer, nano), nano, role)
            assert shown(other.messages) == shown(parser.messages), tokens
            assert other.records == parser.records and other.repairs == parser.repairs
        assert parse(tokens, tokenizer, role, TOOLS) == parser.messages


@given(st.lists(st.one_of(st.integers(0, 270), st.integers(), st.integers(256, 264)), max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_integers_are_read(nano, tokens):
    checked(tokens, nano)
    checked(tokens, nano, role=None)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_messages_do_not_depend_on_where_the_stream_is_cut(nano, data):
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    tokens = mutated(render(conversation(rng), nano, keep_analysis=True), rng, nano)
    whole = checked(tokens, nano, role=None)
    parser, at = Parser(nano, None, TOOLS), 0
    while at < len(tokens):
        step = data.draw(st.integers(1, 40))
        for token in tokens[at : at + step]:
            parser.push(token)
        assert parser.messages == whole.messages[: len(parser.messages)], "a message was taken back"
        at += step
    parser.finish()
    assert parser.messages == whole.messages


def odd_headers(count, seed, tokenizer):
    """Whole messages with headers of letters and punctuation where names belong."""
    rng = random.Random(seed)
    name = lambda: "".join(rng.choices("abf.:/!+-_é ", k=rng.randrange(4)))  # noqa: E731
    starts = ["", "<|start|>", "<|start|>assistant", "<|start|>user:", "<|start|>tool"]
    words = ["<|channel|>", " <|constrain|>", " to=", " to=functions.", " json", "final", " "]
    for _ in range(count):
        text = rng.choice(starts)
        for _ in range(rng.randrange(5)):
            text += rng.choice(words) + name()
        yield rng.choice(["assistant", None]), encode(text + "<|message|>x<|call|>", tokenizer)


def test_whatever_was_read_can_be_part_of_the_next_prompt(tokenizer, nano):
    seen = set()
    for role, tokens in [*streams(1_500, 99, tokenizer), *odd_headers(3_000, 7, tokenizer)]:
        parser = checked(tokens, tokenizer, role)
        seen.update(parser.repairs)
        again = render(parser.messages, nano, keep_analysis=True)
        reread = checked(again, nano, role=None)
        assert [m.content for m in reread.messages] == [m.content for m in parser.messages]
    assert {Repair.UNWRITABLE, Repair.NO_NAME} <= seen


# --- the format's own parser


def theirs(tokens, harmony, role):
    """Messages as openai-harmony reads them, with our names for things."""
    from openai_harmony import Role

    found = harmony.parse_messages_from_completion_tokens(tokens, role=role and Role(role))
    return [
        (
            m.author.role.value,
            m.author.name,
            m.channel,
            None if m.recipient == "all" else m.recipient,
            m.content_type and m.content_type.removeprefix("<|constrain|>"),
            m.content[0].text if m.content else "",
        )
        for m in found
    ]


def ours(messages):
    return [fields[:-1] for fields in shown(messages)]


@pytest.mark.parametrize("role", ["assistant", None])
def test_well_formed_streams_are_read_as_openai_reads_them(tokenizer, harmony, role):
    rng = random.Random(5)
    for _ in range(1_000):
        messages = conversation(rng)
        if role:
            messages = [m for m in messages if m.role == "assistant"]
            calls = [i for i, m in enumerate(messages) if m.recipient]
            messages = messages[: calls[0] + 1] if calls else messages  # a call ends the turn
            if not messages:
                continue
        tokens = render(messages, tokenizer, keep_analysis=True)[2 if role else 0 :]
        parser = checked(tokens, tokenizer, role)
        assert parser.repairs == []
        assert ours(parser.messages) == theirs(tokens, harmony, role) == ours(messages)


def test_a_stream_without_repairs_is_one_that_openai_reads_the_same_way(tokenizer, harmony):
    clean = 0
    for role, tokens in streams(6_000, 99, tokenizer):
        parser = checked(tokens, tokenizer, role)
        if parser.repairs or not tokens:
            continue
        clean += 1
        assert ours(parser.messages) == theirs(tokens, harmony, role)
    assert clean > 500


def test_streaming_agrees_with_openai_token_by_token(tokenizer, harmony):
    from openai_harmony import Role, StreamableParser

    text = "<|channel|>analysis<|message|>Let me see: é😀.<|end|>"
    text += "<|start|>assistant<|channel|>final<|message|>Hello 漢字!<|return|>"
    parser, reference = Parser(tokenizer), StreamableParser(harmony, role=Role.ASSISTANT)
    mine, other = "", ""
    for token in encode(text, tokenizer):
        mine += "".join(e.text for e in parser.push(token) if isinstance(e, Delta))
        reference.process(token)
        other += reference.last_content_delta or ""
        assert mine == other
    assert parser.stop == "return"
