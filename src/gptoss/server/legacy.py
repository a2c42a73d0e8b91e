"""One continuation of a raw prompt, in the words of the completions API."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptoss.engine import Drawn
from gptoss.server.feed import Settings
from gptoss.server.speech import logprob
from gptoss.server.stops import StopStrings
from gptoss.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Fresh:
    """What is new of a choice."""

    text: str = ""
    tokens: list[Drawn] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    reason: str | None = None

    def choice(self, index: int, tokenizer: Tokenizer, *, logprobs: bool) -> dict[str, Any]:
        """As the API has it."""
        return {
            "index": index,
            "text": self.text,
            "logprobs": self._told(tokenizer) if logprobs else None,
            "finish_reason": self.reason,
        }

    def add(self, more: "Fresh") -> None:
        """What came next."""
        self.text += more.text
        self.tokens += more.tokens
        self.offsets += more.offsets
        self.reason = more.reason or self.reason

    def _told(self, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "tokens": [name(d.token, tokenizer) for d in self.tokens],
            "token_logprobs": [
                d.logprob if d.logprob is None else logprob(d.logprob) for d in self.tokens
            ],
            "top_logprobs": [_top(d, tokenizer) for d in self.tokens],
            "text_offset": self.offsets,
        }


class Continuation:
    """Tokens in, text out, up to the end token or a stop string. Its own tokens are text, too:
    other special tokens appear as they are spelled."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings) -> None:
        self.tokens = 0
        self.over = False
        self._tokenizer, self._settings = tokenizer, settings
        self._watch = StopStrings(settings.stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0  # characters that came out
        self._offset = 0  # characters that went in
        self._offsets: dict[int, int] = {}

    def echo(self, text: str, drawn: Sequence[Drawn], prompt: Sequence[int]) -> Fresh:
        """The prompt itself, and what the model thought of its tokens (behind the first)."""
        tokens = [Drawn(prompt[0], None), *drawn] if drawn or len(prompt) == 1 else []
        offsets, decoder, at = [], codecs.getincrementaldecoder("utf-8")("replace"), 0
        for d in tokens:
            offsets.append(at)
            at += len(decoder.decode(self._tokenizer.decode_bytes([d.token])))
        self._length = self._offset = len(text)
        return Fresh(text, tokens, offsets)

    def take(self, drawn: Drawn) -> Fresh:
        """The next token."""
        if self.over:
            return Fresh()
        self.tokens += 1
        if drawn.token in self._tokenizer.stop_tokens and not self._settings.ignore_eos:
            return self.end("stop")
        text = self._decoder.decode(self._tokenizer.decode_bytes([drawn.token]))
        self._offsets[id(drawn)] = self._offset
        self._offset += len(text)
        fresh = self._fresh(*self._watch.feed(text, (drawn,)))
        if self._watch.found is not None:
            self.over, fresh.reason = True, "stop"
        return fresh

    def end(self, reason: str) -> Fresh:
        """No token follows."""
        if self.over:
            return Fresh()
        text, drawn = self._watch.feed(self._decoder.decode(b"", final=True))
        fresh = self._fresh(text, drawn)
        if self._watch.found is None:
            fresh.add(self._fresh(*self._watch.flush()))
        self.over, fresh.reason = True, reason
        return fresh

    def _fresh(self, text: str, drawn: Sequence[Drawn]) -> Fresh:
        return Fresh(text, [*drawn], [self._offsets.pop(id(d)) for d in drawn])


def name(token: int, tokenizer: Tokenizer) -> str:
    """A token as text; one that is no whole character as "bytes:\\\\xe2\\\\x82"."""
    text = tokenizer.decode_bytes([token])
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _top(drawn: Drawn, tokenizer: Tokenizer) -> dict[str, float] | None:
    """The likeliest, and the one that it is."""
    if drawn.logprob is None:
        return None
    top = {name(token, tokenizer): logprob(p) for token, p in drawn.top}
    return {**top, name(drawn.token, tokenizer): logprob(drawn.logprob)}
