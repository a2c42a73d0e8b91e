"""Who says each token, and how a token is written down so that a person can read it."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gptoss.text.messages import Role
from gptoss.text.tokenizer import Tokenizer

Kind = Literal["text", "special", "bytes"]


@dataclass(frozen=True, slots=True)
class Span:
    """One message: tokens start to stop, of which the header ends before body."""

    label: str  # the assistant's channel, anybody else's role, or "text" outside of messages
    start: int
    body: int
    stop: int


def spans(tokens: Sequence[int], tokenizer: Tokenizer) -> list[Span]:
    """The messages of a conversation, whatever state they are in; together all of its tokens."""
    tokens, opening = list(tokens), tokenizer.special("<|start|>")
    starts = [i for i, token in enumerate(tokens) if token == opening]
    edges = sorted({0, *starts, len(tokens)})
    return [
        _span(tokens, tokenizer, start, stop) for start, stop in zip(edges, edges[1:], strict=False)
    ]


def _span(tokens: list[int], tokenizer: Tokenizer, start: int, stop: int) -> Span:
    if tokens[start] != tokenizer.special("<|start|>"):
        return Span("text", start, start, stop)
    message = tokenizer.special("<|message|>")
    body = tokens.index(message, start, stop) + 1 if message in tokens[start:stop] else stop
    words = tokenizer.decode(tokens[start:body]).split("<|")
    said = [word.partition("|>")[2].split() for word in words]
    role = said[1][0].partition(":")[0] if said[1] else "text"
    if role not in ("text", *get_args(Role)):
        role = "tool"  # its name stands in the role's place
    channel = next((s[0] for w, s in zip(words, said, strict=True) if w[:7] == "channel" and s), "")
    return Span(channel or role if role == "assistant" else role, start, body, stop)


def written(token: int, tokenizer: Tokenizer) -> tuple[Kind, str]:
    """A token as text: as it is, a special one's name, or the bytes where they are no text.

    Characters that cannot be seen, or that turn the writing around, are escaped; line ends, tabs
    and spaces are left for the page to show.
    """
    raw = tokenizer.decode_bytes([token])
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "bytes", raw.hex(" ")
    known = tokenizer.is_special(token) or text == f"<|reserved_{token}|>"
    return "special" if known else "text", "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cn", "Co", "Zl"):
        return character
    return f"\\u{{{ord(character):x}}}"
