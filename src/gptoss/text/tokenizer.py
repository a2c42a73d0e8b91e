"""Text <-> token ids by byte-level byte-pair encoding, always offline.

tiktoken does the merges and nothing else: its registry, which downloads, is never touched. Special
tokens are ours: ``encode`` cannot produce one, whatever the text says.

A vocabulary comes from the package (o200k, as gpt-oss uses it) or from a Hugging Face
``tokenizer.json`` of the same kind. A file that would tokenize differently here than there is
refused, never approximated.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Self

from gptoss.errors import TokenizerError
from gptoss.text import vocabulary

_MARK = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join(
    [
        _MARK + _UPPER + "*" + _LOWER + "+" + _ENDING,
        _MARK + _UPPER + "+" + _LOWER + "*" + _ENDING,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_NAMED = {
    "<|startoftext|>": 199_998,
    "<|endoftext|>": 199_999,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
}
_RESERVED = set(range(199_998, 201_088)) - set(_NAMED.values())
HARMONY_SPECIALS = _NAMED | {f"<|reserved_{i}|>": i for i in sorted(_RESERVED)}
STOP_NAMES = ("<|return|>", "<|call|>", "<|endoftext|>")

_LONG = 65_536  # characters; see Tokenizer.encode
_SPACES = re.compile(rf"\s{{1,{_LONG}}}+")


class Tokenizer:
    """A byte-level vocabulary and its special tokens; immutable, safe to share between threads."""

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        specials: Mapping[str, int],
        pattern: str = O200K_PATTERN,
        *,
        ids: Mapping[int, int] | None = None,
    ) -> None:
        """``ranks``: token -> rank, the lower merged first. ``specials``: text -> id.

        A rank is also the token's id, unless ``ids`` maps rank -> id. ``pattern`` (Rust regex
        syntax) cuts text into pieces that are encoded one by one. Raises TokenizerError if a single
        byte is missing, an id is used twice, or the pattern is invalid or drops text.
        """
        import tiktoken  # 40 ms; only those who tokenize pay

        self.pattern = pattern
        self.specials = dict(sorted(specials.items(), key=lambda item: item[1]))
        self._ranks = ranks = dict(ranks)
        self._ids = ids
        ordinary = ranks if ids is None else {token: ids[rank] for token, rank in ranks.items()}
        self._bytes = {i: token for token, i in ordinary.items()}
        self._bytes |= {i: text.encode() for text, i in self.specials.items()}
        self._special_ids = frozenset(self.specials.values())
        _check(ranks, self.specials, self._bytes)
        self._split_specials = re.compile(
            "(" + "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)) + ")"
            if specials
            else r"((?!))"
        )
        try:
            self._bpe = tiktoken.Encoding(
                "gptoss", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
        except ValueError as error:
            raise TokenizerError(f"the vocabulary's pattern is no valid regex: {error}") from None
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise TokenizerError("the vocabulary's pattern leaves out parts of a text")

    @classmethod
    def o200k_harmony(cls) -> "Tokenizer":
        """The vocabulary of gpt-oss, from the package; loaded once. 201,088 ids.

        Raises TokenizerError when the packaged file is missing or damaged.
        """
        return _o200k_harmony()

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a Hugging Face ``tokenizer.json`` of a byte-level BPE vocabulary.

        Raises TokenizerError, one sentence with the path, for anything else: another model type, a
        normalizer, merges that byte-pair encoding by rank would not reproduce, damaged JSON.
        """
        try:
            ranks, ids, specials, pattern = vocabulary.read(Path(path))
            return cls(ranks, specials, pattern, ids=ids)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json`` that Hugging Face's libraries encode the same way."""
        vocabulary.write(Path(path), self._ranks, self._ids, self.specials, self.pattern)

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids; never a special id, also where ``text`` spells a special token.

        Lone surrogates, which UTF-8 cannot express, become U+FFFD; surrogate pairs become their
        character. All other text survives ``decode``. A run of more than 65,536 whitespace
        characters is cut there, because the pattern's lookahead exhausts the regex engine's stack.
        """
        ids = [i for part in _shorten(text) for i in self._bpe.encode_ordinary(part)]
        return ids if self._ids is None else [self._ids[i] for i in ids]

    def encode_with_specials(self, text: str) -> list[int]:
        """Like ``encode``, but special-token text becomes its id. For trusted, raw prompts only."""
        ids: list[int] = []
        for part in self._split_specials.split(text):
            special = self.specials.get(part)
            ids += self.encode(part) if special is None else [special]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to bytes. Specials give their text; ids without a token, ``<|reserved_ID|>``."""
        known = self._bytes
        return b"".join(known[i] if i in known else b"<|reserved_%d|>" % i for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        """The id of a special token such as ``"<|start|>"``; TokenizerError if there is none."""
        try:
            return self.specials[name]
        except KeyError:
            raise TokenizerError(f"the vocabulary has no special token {name}") from None

    def is_special(self, token: int) -> bool:
        """Whether this id is a special token, reserved ones included."""
        return token in self._special_ids

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._bytes.values()))

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return max(self._bytes) + 1

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a completion: return, call and endoftext, as far as they exist."""
        return frozenset(self.specials[name] for name in STOP_NAMES if name in self.specials)


# What a pattern must not lose: every ASCII character, and one of each kind beyond.
_PROBE = "".join(map(chr, range(128))) + " é Ж 漢字 ǅ ʰ ٣ \u0301\u00a0\u2028\u200d\U0001f600\ue000"


def _check(
    ranks: Mapping[bytes, int], specials: Mapping[str, int], by_id: dict[int, bytes]
) -> None:
    if missing := sum(bytes([b]) not in ranks for b in range(256)):
        raise TokenizerError(f"the vocabulary lacks {missing} of the 256 single bytes")
    if len(by_id) < len(ranks) + len(specials):
        raise TokenizerError("the vocabulary uses an id twice")
    if min(by_id) < 0 or max(by_id) >= 1 << 31:
        raise TokenizerError("the vocabulary has ids outside 0 to 2**31 - 1")
    if "" in specials:
        raise TokenizerError("the vocabulary has a special token without text")


def _shorten(text: str) -> Iterator[str]:
    start = 0
    if len(text) > _LONG:
        for run in _SPACES.finditer(text):
            if run.end() - run.start() == _LONG:
                yield text[start : run.end()]
                start = run.end()
    yield text[start:]


@cache
def _o200k_harmony() -> Tokenizer:
    return Tokenizer(vocabulary.o200k_ranks(), HARMONY_SPECIALS)
