"""One answer read token by token, and where prompts may part."""

from types import SimpleNamespace

import pytest

from gptoss.engine import Drawn
from gptoss.llm.llm import conversation
from gptoss.server.served import Thoughts
from gptoss.server.turn import Ask, Closed, Ended, Piece, Reader, boundaries
from gptoss.text import harmony
from gptoss.text.messages import Message
from gptoss.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def served():
    return SimpleNamespace(tokenizer=Tokenizer.o200k_harmony(), thoughts=Thoughts())


def read(served, text, reason="length"):
    reader = Reader(0, served, [], Ask(messages=[]))
    tokens = served.tokenizer.encode_with_specials(text)
    events = [e for t in tokens for e in reader.take(Drawn(t, None))]
    return events + reader.end(reason)


@pytest.mark.parametrize("cut", ["<|channel|>", "<|channel|>ana", "<|channel|>final"])
def test_a_header_that_was_cut_says_nothing(served, cut):
    assert read(served, cut) == [Ended(0, "length")]
    told = read(served, "<|channel|>analysis<|message|>so<|end|><|start|>assistant" + cut)
    assert [e.message.content for e in told if isinstance(e, Closed)] == ["so"]


def test_an_answer_without_a_header_is_an_answer(served):
    told = read(served, "I can not help with that.")
    assert "".join(e.text for e in told if isinstance(e, Piece)) == "I can not help with that."


def test_prompts_may_part_behind_instructions_the_user_and_the_last_message(served):
    turns = conversation(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "sky?"},
            {"role": "assistant", "channel": "analysis", "content": "look"},
            {"role": "assistant", "recipient": "functions.look", "content": "{}"},
            Message(role="tool", name="functions.look", content="grey"),
        ]
    )
    prompt = harmony.render_for_completion(turns, served.tokenizer)
    ends = boundaries(turns, prompt, served)
    said = [served.tokenizer.decode(prompt[:end]) for end in ends]
    assert [text.rsplit("<|message|>")[-1].removesuffix("<|end|>") for text in said] == [
        "# Instructions\n\nbe brief",
        "sky?",
        "grey",
    ]
