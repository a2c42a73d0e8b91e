"""Conversations of other formats become ours, and render."""

import pytest

pytest.importorskip("torch")

import json

from gptoss.errors import TrainingError
from gptoss.train.conversation import documents
from gptoss.train.foreign import convert, from_openai, from_sharegpt
from tests.llm.toy import toy_tokenizer

SHAREGPT = {
    "id": "one",
    "system": "Be brief.",
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "ask",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "blue"},
        {"role": "assistant", "content": "Blue."},
    ],
    "tools": [{"type": "function", "function": {"name": "sky", "parameters": None}}],
}


def text_of(line):
    words = toy_tokenizer()
    return words.decode(documents(line, words)[0].tokens)


def test_sharegpt():
    line = from_sharegpt(SHAREGPT)
    assert line["id"] == "one"
    assert [m["role"] for m in line["messages"]] == ["developer", "user", "assistant"]
    assert "# Instructions\n\nBe brief.<|end|><|start|>user<|message|>Hi<|end|>" in text_of(line)


def test_openai():
    line = from_openai(OPENAI)
    kinds = [(m["role"], m.get("channel"), m["content"]) for m in line["messages"]]
    assert kinds == [
        ("developer", None, "Be brief."),
        ("user", None, "Weather?"),
        ("assistant", "analysis", "ask"),
        ("assistant", "commentary", "{}"),
        ("tool", None, "blue"),
        ("assistant", "final", "Blue."),
    ]
    text = text_of(line)
    assert "type sky = () => any;" in text
    assert "to=functions.sky<|channel|>commentary <|constrain|>json<|message|>{}<|call|>" in text
    assert "<|start|>functions.sky to=assistant<|channel|>commentary<|message|>blue" in text


@pytest.mark.parametrize("form, raw", [("sharegpt", SHAREGPT), ("openai", OPENAI)])
@pytest.mark.parametrize("whole", [True, False])
def test_files(tmp_path, form, raw, whole):
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(json.dumps([raw, raw]) if whole else f"{json.dumps(raw)}\n\n" * 2)
    assert convert(source, target, form) == 2
    assert len(target.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "form, line, said",
    [
        ("sharegpt", '{"messages": []}', "line 2: conversations: expected a list"),
        ("sharegpt", '{"conversations": [{"from": "cat"}]}', "from: 'cat' is none of"),
        ("openai", "[]", "line 2: messages: expected a list"),
        ("openai", '{"messages": [{"role": "tool"}]}', "no call before has this id"),
        ("openai", '{"messages": [{"role": "user", "content": [{}]}]}', "not all text"),
        ("openai", "{", "line 2: not valid JSON"),
        ("openai", "[" * 9999, "line 2: JSON nested too deeply"),
    ],
)
def test_the_first_that_is_something_else_is_named(tmp_path, form, line, said):
    source, target = tmp_path / "in", tmp_path / "out"
    good = SHAREGPT if form == "sharegpt" else OPENAI
    source.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(TrainingError, match=said):
        convert(source, target, form)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_half_a_surrogate_pair_stays(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    turns = [{"role": "user", "content": "Hi \ud800 ☃"}, {"role": "assistant", "content": "Ho"}]
    source.write_text(json.dumps({"messages": turns}))
    assert convert(source, target, "openai") == 1
    assert json.loads(target.read_text("utf-8"))["messages"][0]["content"] == "Hi \ud800 ☃"


def test_what_is_there_stays_what_it_is(tmp_path):
    source, other = tmp_path / "in", tmp_path / "other"
    source.write_text(json.dumps(OPENAI))
    other.write_text("mine")
    for target in (source, other, tmp_path):
        with pytest.raises(TrainingError, match="already exists; choose another name"):
            convert(source, target, "openai")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "other"]
    assert json.loads(source.read_text()) == OPENAI and other.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_a_file_without_a_conversation_is_refused(tmp_path, text):
    (tmp_path / "in").write_text(text)
    with pytest.raises(TrainingError, match="in: there is no conversation in it"):
        convert(tmp_path / "in", tmp_path / "out", "openai")
    assert not (tmp_path / "out").exists()
