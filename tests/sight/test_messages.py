"""Every token has its speaker, and is written so that it can be seen."""

import pytest

from gptoss.sight.messages import Span, spans, written
from tests.llm.toy import toy_tokenizer

WORDS = toy_tokenizer()  # a token for each byte
HEADERS = {
    "<|start|>system<|message|>Hi<|end|>": "system",
    "<|start|>assistant<|channel|>analysis<|message|>Hm<|end|>": "analysis",
    "<|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>{}": "commentary",
    "<|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|call|>": "commentary",
    "<|start|>functions.f to=assistant<|channel|>commentary<|message|>7<|end|>": "tool",
    "<|start|>user:ann<|message|>Hi<|end|>": "user",
    "<|start|>assistant<|message|>no channel<|end|>": "assistant",
    "<|start|>assistant<|channel|>": "assistant",
    "<|start|>assistant<|end|>": "assistant",
    "<|start|>": "text",
    "Hi <|end|> there <|message|>": "text",
}


@pytest.mark.parametrize("text, label", HEADERS.items())
def test_a_message_is_named_by_its_channel_or_its_role(text, label):
    tokens = WORDS.encode_with_specials(text)
    [span] = spans(tokens, WORDS)
    assert (span.label, span.start, span.stop) == (label, 0, len(tokens))


def test_messages_follow_each_other_without_a_gap():
    tokens = WORDS.encode_with_specials("".join(reversed(HEADERS)))
    found = spans(tokens, WORDS)
    assert [s.label for s in found] == [*reversed(HEADERS.values())]
    assert [s.start for s in found][1:] == [s.stop for s in found][:-1]
    assert (found[0].start, found[-1].stop) == (0, len(tokens))


def test_the_body_begins_behind_the_header():
    tokens = WORDS.encode_with_specials("<|start|>user<|message|>Hi<|end|>")
    assert spans(tokens, WORDS) == [Span("user", 0, 6, 9)]


class Saying:
    """A vocabulary of one token."""

    def __init__(self, raw):
        self.raw = raw

    def decode_bytes(self, ids):
        return self.raw

    def is_special(self, token):
        return self.raw == b"<|end|>"


@pytest.mark.parametrize(
    "raw, kind, text",
    [
        (b" word", "text", " word"),
        (b"<|end|>", "special", "<|end|>"),
        (b"<|reserved_7|>", "special", "<|reserved_7|>"),
        (b"\xe2\x82", "bytes", "e2 82"),
        (b"\n\t ", "text", "\n\t "),
        (b"</script>", "text", "</script>"),
        ("\u202edlrow".encode(), "text", "\\u{202e}dlrow"),
        (b"\x00\x1b[2J", "text", "\\u{0}\\u{1b}[2J"),
        ("שלום".encode(), "text", "שלום"),
    ],
)
def test_what_cannot_be_seen_is_written_out(raw, kind, text):
    assert written(7, Saying(raw)) == (kind, text)
