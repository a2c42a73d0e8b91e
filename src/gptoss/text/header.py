"""One harmony header -> who speaks, on which channel, to whom; and what was wrong with it.

Well formed: ``role[ to=recipient][<|channel|>channel[ to=recipient]][ <|constrain|>type]``. Models
also glue words, forget or double them, and forget the ``<|message|>`` that ends the header; then
what cannot be header is content. Headers are bytes here: content must survive exactly.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast, get_args

from gptoss.text.messages import CHANNELS, Message, Role
from gptoss.text.tools import PATH, WORD

MAX_HEADER = 256  # bytes; a well-formed header stays below 180
MAX_WORDS = 6  # assistant to=... commentary to=... json, and one to spare

_ROLES: tuple[Role, ...] = get_args(Role)
_KNOWN = rf"({'|'.join(_ROLES)})?({'|'.join(CHANNELS)})?(?:to=([^\s{{]+)|(json|code))?".encode()
_WORD = re.compile(_KNOWN)  # a header word, or several glued together
_WORD_THEN_TEXT = re.compile(_KNOWN + rb"(?![a-z_])")  # "finalThe", not "finally"
_PROSE = re.compile(rb"\s*+(?:\S++\s++){%d}\S" % MAX_WORDS)
_SPELLED = re.compile(rb"<\|(channel|constrain)\|>")
_TYPE = re.compile(rb"[\w.+/-]+")


class Repair(StrEnum):
    """What had to be mended. The values are stable: they may be logged, counted and compared."""

    NO_HEADER = "text without a header"
    NO_START = "header without <|start|>"
    REPEATED_START = "repeated <|start|>"
    NO_ROLE = "no role"
    REPEATED_ROLE = "repeated role"
    UNKNOWN_ROLE = "unknown role"
    FOREIGN_ROLE = "turn of another role"
    NO_CHANNEL = "no channel"
    BARE_CHANNEL = "channel without <|channel|>"
    UNKNOWN_CHANNEL = "unknown channel"
    TWO_CHANNELS = "two channels"
    NO_WORD = "<|channel|> or <|constrain|> without a word"
    SPACED = "space between <|channel|> or <|constrain|> and its word"
    SPELLED = "special token spelled as text in a header"
    GLUED = "glued header words"
    UNKNOWN_WORD = "unknown header word"
    UNWRITABLE = "name that no header can have"
    NO_TO = "recipient without to="
    TWO_RECIPIENTS = "two recipients"
    NO_NAME = "tool answer without the tool's name"
    NO_RECIPIENT = "tool answer without a recipient"
    NO_NAMESPACE = "function without its namespace"
    CALL_ON_ANALYSIS = "function call on the analysis channel"
    NO_CONSTRAIN = "content type without <|constrain|>"
    CODE_FOR_JSON = "code in place of json"
    TYPE_FIRST = "content type before the recipient"
    TWO_TYPES = "two content types"
    END_IN_HEADER = "end token inside a header"
    NO_MESSAGE = "header without <|message|>"
    ABANDONED = "header that came to nothing"
    STRAY_MESSAGE = "<|message|> inside content"
    STRAY_TOKEN = "unexpected special token"
    EMPTY = "empty message"
    NO_END = "no end token before the next message"
    ENDOFTEXT = "ended by <|endoftext|>"
    REDUNDANT_END = "redundant end token"
    AFTER_STOP = "text after the turn had stopped"
    CUT = "stream ended inside a message"
    BAD_UTF8 = "bytes that are not UTF-8"


@dataclass(slots=True)
class Header:
    """A header as it arrives: its text, and where a marker stood in it."""

    started: bool = False  # after <|start|>
    prefilled: bool = False  # the prompt has written "<|start|>role"
    text: bytearray = field(default_factory=bytearray)
    marks: list[tuple[int, str]] = field(default_factory=lambda: [(0, "")])

    def mark(self, kind: str) -> bool:
        """Put "channel", "constrain" or, for a break, "" at the end; False after a wordless one."""
        at, last = self.marks[-1]
        if at < len(self.text):
            self.marks.append((len(self.text), kind))
        elif kind:
            self.marks[-1] = (at, kind)
            return not last
        return True

    @property
    def marked(self) -> bool:
        """Whether it has a marker or a break."""
        return self.marks != [(0, "")]

    def prose_from(self) -> int | None:
        """How many of its bytes prove that this is too long for a header."""
        if match := _PROSE.match(self.text[:MAX_HEADER]):
            return match.end()
        return MAX_HEADER if len(self.text) >= MAX_HEADER else None

    def words(self) -> Iterator[tuple[str, Repair | None, int, bytes]]:
        """Each word as (marker before it, what is odd about that, offset, word).

        A marker without a word comes with an empty one.
        """
        text = bytes(self.text)
        ends = [at for at, _ in self.marks[1:]] + [len(text)]
        for (start, kind), end in zip(self.marks, ends, strict=True):
            odd = None
            for marker in [*_SPELLED.finditer(text, start, end), None]:
                stop = marker.start() if marker else end
                found = [(start + m.start(), m[0]) for m in re.finditer(rb"\S+", text[start:stop])]
                if kind and not found:
                    found = [(stop, b"")]
                elif kind and found[0][0] > start:
                    odd = odd or Repair.SPACED
                for at, word in found:
                    yield kind, odd, at, word
                    kind, odd = "", None
                if marker:
                    start, kind, odd = marker.end(), marker[1].decode(), Repair.SPELLED


class Reading:
    """What a header says, read word by word.

    ``complete``: it ended in <|message|>, so all of it is header. Else the first word that cannot
    be header begins the content, at byte ``end``.
    """

    def __init__(self, header: Header, tools: frozenset[str], complete: bool) -> None:
        self.role: Role | None = None
        self.name: str | None = None
        self.channel: str | None = None
        self.recipient: str | None = None
        self.content_type: str | None = None
        self.end = len(header.text)
        self.repairs: list[Repair] = []
        self._header, self._tools, self._complete = header, tools, complete
        self._constrained = False
        if not (complete or header.started or header.marked or header.text.lstrip()[:3] == b"to="):
            self.end = 0
            self.repairs.append(Repair.NO_HEADER)
            return
        author = True  # the first word may be the author's
        for kind, odd, at, word in header.words():
            if odd:
                self.repairs.append(odd)
            taken = self._take(kind, word, author and not kind)
            if taken < len(word):
                self.end = at + taken
                return
            author = False

    @property
    def understood(self) -> bool:
        """Whether any word was."""
        said = (self.role, self.name, self.channel, self.recipient, self.content_type)
        return said != (None,) * 5

    def message(self, expected: Role | None) -> Message:
        """The message so far. Fills in what was left out, reports what is odd about the whole.

        Whatever it read, ``harmony.render`` can write: the message may be part of the next prompt.
        """
        header, odd = self._header, self.repairs
        if not (header.started or header.prefilled or Repair.NO_HEADER in odd):
            odd.append(Repair.NO_START)
        role, channel, content_type = self.role, self.channel, self.content_type
        name, recipient = self._writable(self.name), self._writable(self.recipient)
        if role is None and self.name:
            role = "tool" if self.recipient or self._is_function(self.name) else "assistant"
            if not self.recipient:
                odd.append(Repair.NO_RECIPIENT if role == "tool" else Repair.UNKNOWN_ROLE)
        elif role is None:
            role = expected or "assistant"
            if header.started:
                odd.append(Repair.NO_ROLE)
        elif role == "tool":
            odd.append(Repair.NO_NAME)
        if role == "tool":
            name = name or "tool"  # its header then reads as the model wrote it
        if expected not in (None, role):
            odd.append(Repair.FOREIGN_ROLE)
        call = role == "assistant" and (recipient or "").startswith("functions.")
        if channel is not None and not WORD.fullmatch(channel):
            odd.append(Repair.UNWRITABLE)
            spoken = ("commentary" if recipient else "final") if role == "assistant" else None
            channel = next((known for known in CHANNELS if channel.startswith(known)), spoken)
        elif role == "assistant" and channel is None:
            channel = "commentary" if recipient else "final"
            if Repair.NO_HEADER not in odd:
                odd.append(Repair.NO_CHANNEL)
        elif channel not in (None, *CHANNELS):
            odd.append(Repair.UNKNOWN_CHANNEL)
        elif call and channel == "analysis":
            odd.append(Repair.CALL_ON_ANALYSIS)
        if call and content_type == "code":
            content_type = "json"
            odd.append(Repair.CODE_FOR_JSON)
        elif content_type and not WORD.fullmatch(content_type):
            content_type = None
            odd.append(Repair.UNWRITABLE)
        elif content_type and not self._constrained and (call or not recipient):
            odd.append(Repair.NO_CONSTRAIN)
        return Message(
            role=role,
            content="",
            name=name,
            channel=channel,
            recipient=None if recipient == "all" else recipient,
            content_type=content_type,
        )

    def _writable(self, name: str | None) -> str | None:
        """A name as a header can have it, None if nothing of it is left."""
        if name is None or PATH.fullmatch(name):
            return name
        self.repairs.append(Repair.UNWRITABLE)
        parts = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).split(".")
        return ".".join(part[:64] for part in parts if part) or None

    def _take(self, kind: str, word: bytes, author: bool) -> int:
        """Read one word; how many of its bytes are header."""
        match = _WORD.fullmatch(word) if self._complete else _WORD_THEN_TEXT.match(word)
        role, channel, to, content_type = match.groups() if match else (None,) * 4
        if (
            not (match and match[0])
            or (role and not author)
            or (channel and (kind == "constrain" or (not kind and self.channel)))
            or (content_type and not (kind or self.recipient or self._complete))
        ):
            return self._take_by_place(kind, word, author and not self._header.prefilled)
        if sum(map(bool, match.groups())) > 1:
            self.repairs.append(Repair.GLUED)
        if (kind == "channel" and not channel) or (kind == "constrain" and not content_type):
            self.repairs.append(Repair.NO_WORD)
        if role:
            self.role = cast(Role, role.decode())
            if self._header.prefilled:
                self.repairs.append(Repair.REPEATED_ROLE)
        if channel:
            self._set_channel(channel.decode(), marked=kind == "channel")
        if to:
            self._set_recipient(to.decode("utf-8", "replace"))
        if content_type:
            self._set_type(content_type.decode(), constrained=kind == "constrain")
        return match.end()

    def _take_by_place(self, kind: str, word: bytes, author: bool) -> int:
        """Read a word that is none of the known ones by where it stands."""
        text = word.decode("utf-8", "replace")
        role, _, name = text.partition(":")
        if not word:
            self.repairs.append(Repair.NO_WORD)
        elif kind == "channel" and self._complete:
            self._set_channel(text, marked=True)
        elif kind == "constrain" and (match := _TYPE.match(word)):
            self._set_type(match[0].decode(), constrained=True)
            if not self._complete:
                return match.end()
            if match.end() < len(word):
                self.repairs.append(Repair.UNKNOWN_WORD)
        elif author and role in _ROLES:
            self.role, self.name = role, name
        elif author and (self._complete or self._is_function(text)):
            self.name = text
        elif not self._complete:
            return 0
        elif self._is_function(text) and self.recipient is None:
            self.repairs.append(Repair.NO_TO)
            self._set_recipient(text)
        elif self.recipient and not self.content_type and _TYPE.fullmatch(word):
            self._set_type(text, constrained=False)
        else:
            self.repairs.append(Repair.UNKNOWN_WORD)
        return len(word)

    def _is_function(self, text: str) -> bool:
        return text in self._tools or text.startswith("functions.")

    # Of two the last one counts.

    def _set_channel(self, channel: str, marked: bool) -> None:
        if self.channel is not None:
            self.repairs.append(Repair.TWO_CHANNELS)
        if not marked:
            self.repairs.append(Repair.BARE_CHANNEL)
        self.channel = channel

    def _set_type(self, content_type: str, constrained: bool) -> None:
        if self.content_type is not None:
            self.repairs.append(Repair.TWO_TYPES)
        self.content_type, self._constrained = content_type, constrained

    def _set_recipient(self, name: str) -> None:
        if self.recipient is not None:
            self.repairs.append(Repair.TWO_RECIPIENTS)
        if self.content_type is not None:
            self.repairs.append(Repair.TYPE_FIRST)
        function, glued = self._unglue(name.removeprefix("functions."))
        if function in self._tools:
            if not name.startswith("functions."):
                self.repairs.append(Repair.NO_NAMESPACE)
            name = "functions." + function
        self.recipient = name
        if glued:
            self.repairs.append(Repair.GLUED)
            self._take("", glued.encode(), author=False)

    def _unglue(self, name: str) -> tuple[str, str]:
        """Split what is glued to the name of a known function: "get_weatherjson"."""
        if name not in self._tools:
            for tool in sorted(self._tools, key=len, reverse=True):
                rest = name.removeprefix(tool)
                if rest != name and _WORD.fullmatch(rest.encode()):
                    return tool, rest
        return name, ""
