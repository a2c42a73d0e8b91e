"""A conversation as JSON -> the tokens the model reads, and which of them it learns to say.

    {"messages": [{"role": "user", "content": "17 + 25?"},
                  {"role": "assistant", "channel": "analysis", "content": "17 + 25 = 42"},
                  {"role": "assistant", "content": "42"}],
     "tools": [...], "effort": "low", "instructions": "...", "current_date": "2026-11-21"}

Only ``messages`` must be there; what is not for the model goes under ``id`` and ``meta``. A line
with ``text`` instead is read, and learned, as it is. Rendering is ``text/harmony.py``'s, so a model
sees in training what it will see when it is asked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss.text import harmony
from gptoss.text.messages import Message
from gptoss.text.tokenizer import Tokenizer
from gptoss.train.batch import IGNORE, Document

OPTIONS = ("tools", "effort", "instructions", "current_date")
KNOWN = ("messages", "text", *OPTIONS, "id", "meta")


def documents(
    raw: Any,
    tokenizer: Tokenizer,
    *,
    train_on: Sequence[str] = ("assistant",),
    longest: int | None = None,
    origin: str = "",
) -> list[Document]:
    """What one line gives: one document, or one a turn where later turns forget thoughts.

    Args:
        raw: the line's JSON.
        tokenizer: the model's.
        train_on: whose messages are learned: a role, or a role and its channel: "assistant/final".
        longest: most tokens of a document; a text is cut into such pieces.
        origin: for messages.

    Raises:
        ValueError: it is no conversation, nothing in it is learned, or it is too long.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"expected a JSON object, found {type(raw).__name__}")
    if unknown := [key for key in raw if key not in KNOWN]:
        raise ValueError(
            f"{unknown[0]!r} is none of {', '.join(KNOWN)}; what is not for the model goes "
            "under meta"
        )
    if "text" in raw:
        return _pieces(raw["text"], tokenizer, longest, origin)
    whole = messages_of(raw)
    found = [
        _document(earlier, turn, tokenizer, train_on, origin) for earlier, turn in _turns(whole)
    ]
    if not any(document.trained for document in found):
        raise ValueError(f"no message is of {' or '.join(train_on)}, so nothing would be learned")
    size = max(len(document.tokens) for document in found)
    if longest is not None and size > longest:
        raise ValueError(
            f"the conversation has {size} tokens, more than the {longest} there may be"
        )
    return [document for document in found if document.trained]


def messages_of(raw: Mapping[str, Any]) -> list[Message]:
    """All messages of a line, with the system message that chatting would put in front."""
    messages = raw.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list of at least one message")
    read = []
    for i, message in enumerate(messages):
        try:
            read.append(harmony.as_message(message))
        except ValueError as error:
            raise ValueError(f"messages[{i}]: {error}") from None
    options = {key: raw[key] for key in OPTIONS if raw.get(key) is not None}
    return harmony.with_defaults(read, **options)


def _pieces(text: Any, tokenizer: Tokenizer, longest: int | None, origin: str) -> list[Document]:
    if not isinstance(text, str) or not text:
        raise ValueError("text: expected a string that is not empty")
    end = tokenizer.special("<|endoftext|>")
    ids = tokenizer.encode(text)
    tokens, targets = [end, *ids], [*ids, end]  # what came before is another text
    step = longest or len(tokens)
    cuts = range(0, len(tokens), step)
    return [Document(tokens[i : i + step], targets[i : i + step], origin) for i in cuts]


def _ends_turn(message: Message) -> bool:
    return message.role == "assistant" and message.channel == "final"


def _turns(messages: Sequence[Message]) -> list[tuple[list[Message], list[Message]]]:
    """(what came before, what is learned) of every document.

    Sampling forgets the thoughts of turns that have been answered. So where such thoughts are to be
    learned, each turn is a document of its own, after a past without thoughts.
    """
    cuts = [i + 1 for i, message in enumerate(messages) if _ends_turn(message)]
    last = max((cut for cut in cuts if cut < len(messages)), default=0)  # the last turn's beginning
    if all(message.channel != "analysis" for message in messages[:last]):
        return [([], list(messages))]
    begins = [0, *(cut for cut in cuts if cut < len(messages))]
    ends = [*begins[1:], len(messages)]
    return [
        ([m for m in messages[:begin] if m.channel != "analysis"], list(messages[begin:end]))
        for begin, end in zip(begins, ends, strict=True)
    ]


def _document(
    earlier: list[Message],
    turn: list[Message],
    tokenizer: Tokenizer,
    train_on: Sequence[str],
    origin: str,
) -> Document:
    messages = [*earlier, *turn]
    tokens = harmony.render(messages, tokenizer, keep_analysis=True)
    start = tokenizer.special("<|start|>")
    begins = [i for i, token in enumerate(tokens) if token == start]  # text cannot spell it
    assert len(begins) == len(messages)
    head = 1 + len(tokenizer.encode("assistant"))
    targets = [IGNORE] * len(tokens)  # of the token itself, for now
    for i, (message, begin) in enumerate(zip(messages, begins, strict=True)):
        end = begins[i + 1] if i + 1 < len(begins) else len(tokens)
        if i < len(earlier) or not _selected(message, train_on):
            continue
        # What opens a turn is given when sampling; within one the model says it.
        inside = i > 0 and messages[i - 1].role == "assistant" and _goes_on(messages[i - 1])
        skip = head if message.role == "assistant" and not inside else 0
        targets[begin + skip : end] = tokens[begin + skip : end]
        if _ends_turn(message):  # read as <|end|> later, said as <|return|>
            targets[end - 1] = tokenizer.special("<|return|>")
    return Document(tokens[:-1], targets[1:], origin)


def _selected(message: Message, train_on: Sequence[str]) -> bool:
    return message.role in train_on or f"{message.role}/{message.channel}" in train_on


def _goes_on(message: Message) -> bool:
    """Whether the model goes on speaking after this message of its own."""
    return not _ends_turn(message) and message.recipient is None
