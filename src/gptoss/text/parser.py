"""Tokens -> messages, one token at a time: the reading half of harmony.

The parser is total. Whatever integers arrive, it never raises, and it keeps four promises:

* Bytes. Structure is the special tokens, text is the bytes of all others. Each message has a
  ``Record`` of its header's and its content's bytes, and after ``finish``
  ``b"".join(r.header + r.content for r in parser.records) + parser.tail`` is exactly the text that
  was pushed. ``Message.content`` is the record's content read as UTF-8, U+FFFD for what is none.
* Streaming. The deltas of a message concatenate to its content. A header holds text back for at
  most 256 bytes or 6 words (see ``header``); what is longer is prose, and prose without a header
  is the final answer. How the text is cut into tokens changes nothing.
* Reports. What it mended is in ``Message.repairs``, or ``Parser.repairs`` if it belongs to none. A
  stream without repairs is one that a strict parser reads the same way.
* Silence. Structure alone makes no message: that takes content, or a header that says something
  and ends in ``<|message|>`` or, naming a recipient, in ``<|call|>``.

Tokens that are neither text nor harmony's (reserved, padding, out of range) are dropped and
reported. Time is linear in the tokens, memory in the text.

The states: outside; in a header (``_header``); in content (``_open``). Both are set after a
``<|channel|>`` inside content, until it is known for a stray token or for a forgotten ``<|end|>``.
"""

import codecs
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from gptoss.text.header import Header, Reading, Repair
from gptoss.text.messages import Message, Role
from gptoss.text.tokenizer import Tokenizer

__all__ = ["Delta", "Event", "MessageEnd", "Parser", "Record", "Repair", "parse"]

_ENDS = ("end", "return", "call", "endoftext")
_NAMES = ("start", "channel", "constrain", "message", *_ENDS)
_utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of one message. ``message_index`` counts messages from 0; ``text`` is not empty."""

    message_index: int
    role: Role
    channel: str | None
    recipient: str | None
    text: str


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """A message is complete, or the stream was cut inside it."""

    message_index: int
    message: Message


Event = Delta | MessageEnd


@dataclass(frozen=True, slots=True)
class Record:
    """The exact bytes of one message. Abandoned headers before it are part of its header."""

    header: bytes
    content: bytes


@dataclass(slots=True)
class _Open:
    """A message whose content is arriving."""

    message: Message  # its content still empty
    named: bool  # its header says something
    header: bytes
    repairs: list[Repair]
    content: bytearray = field(default_factory=bytearray)
    text: list[str] = field(default_factory=list)
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _utf8("replace"))


class Parser:
    """Push tokens, take events.

    ``role`` is the one whose header the prompt has already opened ("<|start|>assistant"); None
    expects whole messages of any role. ``tools`` are the known functions, by which a name that is
    glued to the next word is recognised.
    """

    def __init__(
        self, tokenizer: Tokenizer, role: Role | None = "assistant", tools: Iterable[str] = ()
    ) -> None:
        self.messages: list[Message] = []  # complete; after finish() also the one cut off
        self.records: list[Record] = []  # one for each message
        self.stop: str | None = None  # the last of the _ENDS; None if a message began after it
        self._tokenizer = tokenizer
        self._names = {tokenizer.special(f"<|{name}|>"): name for name in _NAMES}
        self._role = role
        self._tools = frozenset(tool.removeprefix("functions.") for tool in tools)
        self._header = Header(prefilled=True) if role else None
        self._open: _Open | None = None
        self._abandoned = bytearray()  # text of headers that came to nothing
        self._pending: list[Repair] = []  # repairs that the next message will report
        self._events: list[Event] = []

    @property
    def repairs(self) -> list[str]:
        """Every repair so far, those that belong to no message included."""
        current = self._open.repairs if self._open else []
        return [r for m in self.messages for r in m.repairs] + [*current, *self._pending]

    @property
    def tail(self) -> bytes:
        """Text after the last message that belongs to none: a header that came to nothing."""
        return bytes(self._abandoned + (self._header.text if self._header else b""))

    def push(self, token: int) -> list[Event]:
        """Read one token."""
        match self._names.get(token):
            case None:
                text = self._text_of(token)
                if text is None:
                    self._note(Repair.STRAY_TOKEN)
                elif text:
                    self._on_text(text)
            case "start":
                self._on_start()
            case "channel" | "constrain" as marker:
                self._on_marker(marker)
            case "message":
                self._on_message()
            case end:
                self._on_end(end)
        return self._take_events()

    def finish(self) -> list[Event]:
        """The stream has ended: close what is open. A second call does nothing."""
        if self._header:
            self._settle()
        if self._header:
            if self._header.started or self._header.marked:
                self._note(Repair.CUT)
            elif self._header.text:
                self._note(Repair.ABANDONED)
            self._abandon_header()
        self._close(Repair.CUT)
        return self._take_events()

    def _text_of(self, token: int) -> bytes | None:
        """The bytes of an ordinary token; None for a special one, or where there is no token."""
        if self._tokenizer.is_special(token):
            return None
        text = self._tokenizer.decode_bytes([token])
        return None if text == b"<|reserved_%d|>" % token else text

    # The five kinds of token.

    def _on_text(self, text: bytes) -> None:
        if self._open and not self._header:
            return self._feed(text)
        header = self._enter_header()
        header.text += text
        if (cut := header.prose_from()) is not None:
            rest = bytes(header.text[cut:])
            del header.text[cut:]
            self._settle(must=True)
            self._feed(rest)

    def _on_marker(self, kind: str) -> None:
        if self._open and not self._header and kind == "constrain":
            self._note(Repair.STRAY_TOKEN)
        elif not self._enter_header().mark(kind):
            self._note(Repair.NO_WORD)

    def _on_message(self) -> None:
        if self._open and not self._header:
            return self._note(Repair.STRAY_MESSAGE)
        header = self._enter_header()
        self._close(Repair.NO_END)
        self._begin(Reading(header, self._tools, complete=True), header)

    def _on_start(self) -> None:
        if self._header:
            self._settle()
        if self._header:
            opened = self._header.started or self._header.prefilled
            self._note(Repair.REPEATED_START if opened else Repair.ABANDONED)
            self._abandon_header()
        self._close(Repair.NO_END)
        self._enter_header(started=True)

    def _on_end(self, name: str) -> None:
        if self._header:
            self._settle(called=name == "call")
        if self._header:
            self._header.mark("")
            self._note(Repair.END_IN_HEADER)
        elif self._open:
            self._close(Repair.ENDOFTEXT if name == "endoftext" else None)
        else:
            self._note(Repair.REDUNDANT_END)
        self.stop = name

    # From one state to another.

    def _enter_header(self, started: bool = False) -> Header:
        """The header that is being read, a new one if there is none."""
        if self._header is None:
            if self._role and self.stop not in (None, "end"):
                self._note(Repair.AFTER_STOP)
            self._header = Header(started=started)
        return self._header

    def _abandon_header(self) -> None:
        assert self._header is not None
        self._abandoned += self._header.text
        self._header = None

    def _settle(self, called: bool = False, must: bool = False) -> None:
        """Read a header that has no <|message|>: what cannot be header is content.

        Without content it stays as it is, unless it ``must`` become a message or is a function
        ``called`` without arguments.
        """
        header = self._header
        assert header is not None
        reading = Reading(header, self._tools, complete=False)
        if self._open and not reading.understood:
            self._header = None
            self._note(Repair.STRAY_TOKEN)
            return self._feed(bytes(header.text))
        self._close(Repair.NO_END)
        content = bytes(header.text[reading.end :])
        if content.strip() or must or (called and reading.recipient):
            if Repair.NO_HEADER not in reading.repairs:
                reading.repairs.append(Repair.NO_MESSAGE)
            self._begin(reading, header)
            self._feed(content)

    def _begin(self, reading: Reading, header: Header) -> None:
        message = reading.message(self._role)
        repairs = list(dict.fromkeys(self._pending + reading.repairs))
        text = bytes(header.text[: reading.end])
        self._open = _Open(message, reading.understood, text, repairs)
        self._header, self._pending, self.stop = None, [], None

    def _feed(self, text: bytes, final: bool = False) -> None:
        assert self._open is not None
        self._open.content += text
        if delta := self._open.decoder.decode(text, final):
            self._open.text.append(delta)
            m = self._open.message
            self._events.append(Delta(len(self.messages), m.role, m.channel, m.recipient, delta))

    def _close(self, repair: Repair | None) -> None:
        """Close the message that is open, if any; one that is nothing but structure is dropped."""
        if self._open is None:
            return
        self._feed(b"", final=True)
        closed, self._open = self._open, None
        repairs = closed.repairs + ([repair] if repair else [])
        if not closed.content:
            repairs.append(Repair.EMPTY)
            if not closed.named:
                self._abandoned += closed.header
                self._pending = list(dict.fromkeys(repairs + self._pending))
                return
        record = Record(bytes(self._abandoned) + closed.header, bytes(closed.content))
        self._abandoned.clear()
        if not (_is_utf8(closed.header) and _is_utf8(record.content)):
            repairs.append(Repair.BAD_UTF8)
        message = replace(
            closed.message, content="".join(closed.text), repairs=tuple(dict.fromkeys(repairs))
        )
        self._events.append(MessageEnd(len(self.messages), message))
        self.messages.append(message)
        self.records.append(record)

    def _note(self, repair: Repair) -> None:
        repairs = self._open.repairs if self._open and not self._header else self._pending
        if repair not in repairs:
            repairs.append(repair)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def parse(
    tokens: Iterable[int],
    tokenizer: Tokenizer,
    role: Role | None = "assistant",
    tools: Iterable[str] = (),
) -> list[Message]:
    """All messages of a whole stream; see ``Parser``."""
    parser = Parser(tokenizer, role, tools)
    for token in tokens:
        parser.push(token)
    parser.finish()
    return parser.messages


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
