"""What a conversation becomes: exactly what sampling reads, and what is learned of it."""

import pytest

pytest.importorskip("torch")

from gptoss.llm.llm import conversation
from gptoss.text import harmony
from gptoss.train.batch import IGNORE
from gptoss.train.conversation import documents
from tests.llm.toy import toy_tokenizer

WORDS = toy_tokenizer()
SUM = [
    {"role": "user", "content": "17 + 25?"},
    {"role": "assistant", "channel": "analysis", "content": "17 + 25 = 42"},
    {"role": "assistant", "content": "42"},
]
CALL = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "channel": "analysis", "content": "ask"},
    {
        "role": "assistant",
        "recipient": "functions.weather",
        "content_type": "json",
        "content": "{}",
    },
    {"role": "tool", "name": "functions.weather", "content": "sun"},
    {"role": "assistant", "content": "Sunny."},
]
TOOLS = [{"name": "weather", "description": "of today"}]


def learned(document):
    """The stretches that are learned, as text."""
    found, before = [], False
    for target in document.targets:
        if target != IGNORE:
            text = WORDS.decode([target])
            found = [*found[:-1], found[-1] + text] if before else [*found, text]
        before = target != IGNORE
    return found


def read(messages, **rest):
    train_on = rest.pop("train_on", ("assistant",))
    return documents({"messages": messages, **rest}, WORDS, train_on=train_on)


def test_a_turn_is_learned_from_where_sampling_begins_to_where_it_stops():
    [document] = read(SUM)
    assert learned(document) == [
        "<|channel|>analysis<|message|>17 + 25 = 42<|end|>"
        "<|start|>assistant<|channel|>final<|message|>42<|return|>"
    ]


def test_what_is_read_is_what_sampling_reads():
    """Up to the first learned token: the prompt that chatting renders, token for token."""
    for messages, options in [(SUM, {"effort": "high"}), (CALL, {"tools": TOOLS})]:
        [document] = read(messages, **options)
        first = next(i for i, target in enumerate(document.targets) if target != IGNORE)
        prompt = harmony.render_for_completion(conversation(messages[:1], **options), WORDS)
        assert document.tokens[: first + 1] == prompt


def test_a_call_ends_a_turn_and_what_opens_the_next_is_given():
    [document] = read(CALL, tools=TOOLS)
    assert learned(document) == [
        "<|channel|>analysis<|message|>ask<|end|><|start|>assistant to=functions.weather"
        "<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>final<|message|>Sunny.<|return|>",
    ]


def test_forgotten_thoughts_are_learned_where_they_are_still_read():
    """A document a turn; the past of each is without thoughts, as in sampling."""
    second = [{"role": "user", "content": "And 1 + 1?"}, *SUM[1:]]
    one, two = read([*SUM, *second])
    assert learned(one) == learned(two) == learned(read(SUM)[0])
    prompt = conversation([*SUM, second[0]])
    assert WORDS.decode(two.tokens).startswith(
        WORDS.decode(harmony.render_for_completion(prompt, WORDS, keep_analysis=True))
    )
    bare = [m for m in SUM if m.get("channel") != "analysis"]
    assert len(read([*bare, *second])) == 1, "nothing is forgotten there"


def test_an_answer_in_the_past_is_read_as_ended_and_said_as_returned():
    bare = [SUM[0], SUM[2]]
    [document] = read([*bare, *bare])
    finish = WORDS.special("<|return|>")
    ends = [i for i, target in enumerate(document.targets) if target == finish]
    assert len(ends) == 2
    assert document.tokens[ends[0] + 1] == WORDS.special("<|end|>")


@pytest.mark.parametrize(
    "train_on, expected",
    [
        (("assistant/final",), ["<|start|>assistant<|channel|>final<|message|>42<|return|>"]),
        (("assistant/analysis",), ["<|channel|>analysis<|message|>17 + 25 = 42<|end|>"]),
        (("user",), ["<|start|>user<|message|>17 + 25?<|end|>"]),
    ],
)
def test_roles_and_channels_are_chosen(train_on, expected):
    assert learned(read(SUM, train_on=train_on)[0]) == expected


def test_a_text_is_learned_whole_in_pieces():
    pieces = documents({"text": "abcdefg"}, WORDS, longest=3)
    assert [len(piece.tokens) for piece in pieces] == [3, 3, 2]
    assert "".join("".join(learned(piece)) for piece in pieces) == "abcdefg<|endoftext|>"


@pytest.mark.parametrize(
    "raw, said",
    [
        ([], "expected a JSON object, found list"),
        ({"message": []}, "'message' is none of messages, text"),
        ({"messages": []}, "messages: expected a list of at least one message"),
        ({"messages": [{"role": "human", "content": "x"}]}, r"messages\[0\]: role: 'human'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content: NoneType"),
        ({"messages": SUM[:1]}, "no message is of assistant, so nothing would be learned"),
        ({"messages": SUM, "effort": "much"}, "effort: 'much'"),
        ({"text": ""}, "text: expected a string"),
        ({"messages": [*SUM[:2], {**SUM[2], "content": "4" * 500}]}, "more than the 400"),
    ],
)
def test_what_is_no_conversation_is_one_sentence(raw, said):
    with pytest.raises(ValueError, match=said):
        documents(raw, WORDS, longest=400)
