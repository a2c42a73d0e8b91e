"""Text <-> token ids by byte-level byte-pair encoding, always offline.

tiktoken does the merges and nothing else: its registry, which downloads, is never touched. Special
tokens are ours: ``encode`` cannot produce one, whatever the text says.

A vocabulary comes from the package (o200k, as gpt-oss uses it) or from a Hugging Face
``tokenizer.json`` of the same kind. A file that would tokenize differently here than there is
refused, never approximated.
"""

import base64
import hashlib
import json
import lzma
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Self

from ..errors import TokenizerError

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
O200K_SIZE = 199_998  # ordinary tokens
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"  # the rank file
O200K_PACKED_SHA256 = (
    "440741350e7cfa1c0f4869ce742d1b043550adbda5187adcac9e787edac6fba9"  # the unpacked asset
)
O200K_ASSET = Path(__file__).parent.parent / "assets" / "o200k.xz"

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

MAX_FILE = 256 << 20  # bytes of a tokenizer.json; the largest published ones have about 35 MB
MAX_TOKEN = 512  # bytes of one token; o200k's longest has 128
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
            return cls(**_read(Path(path)))
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json`` that Hugging Face's libraries encode the same way."""
        Path(path).write_text(json.dumps(_document(self), ensure_ascii=False), encoding="utf-8")

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


def unpack_ranks(packed: bytes) -> Iterator[bytes]:
    """The asset's format: one byte per token with its length, then all tokens' bytes, by rank."""
    at = O200K_SIZE
    for length in packed[:O200K_SIZE]:
        yield packed[at : at + length]
        at += length


@cache
def _o200k_harmony() -> Tokenizer:
    try:
        packed = lzma.decompress(O200K_ASSET.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise TokenizerError(f"{O200K_ASSET}: {error}; reinstall the package") from None
    if hashlib.sha256(packed).hexdigest() != O200K_PACKED_SHA256:
        raise TokenizerError(f"{O200K_ASSET}: not the o200k vocabulary; reinstall the package")
    ranks = {token: rank for rank, token in enumerate(unpack_ranks(packed))}
    return Tokenizer(ranks, HARMONY_SPECIALS)


def o200k_rank_file() -> bytes:
    """The text of ``o200k_base.tiktoken``, which other libraries read: lines ``base64 rank``."""
    ranks = Tokenizer.o200k_harmony()._ranks
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


# --- Hugging Face's tokenizer.json. Bytes are written as printable characters: those that are
# printable in Latin-1 as themselves, the others from U+0100 on (GPT-2's encoder.py).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_TO_CHAR = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
_TO_BYTE = {char: b for b, char in _TO_CHAR.items()}


def _spell(token: bytes) -> str:
    return "".join(_TO_CHAR[b] for b in token)


def _unspell(text: str) -> bytes:
    try:
        token = bytes(_TO_BYTE[char] for char in text)
    except KeyError:
        raise TokenizerError(f"the token {text[:40]!r} is not written in bytes") from None
    if not 0 < len(token) <= MAX_TOKEN:
        raise TokenizerError(f"a token has {len(token)} bytes, expected 1 to {MAX_TOKEN}")
    return token


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The only two parts that encoding ever merges into ``token``; None if it never does.

    Merging goes by rank, and nothing outside a span influences it before the span's border is
    crossed. So the parts are the ones left when ``token`` alone is encoded up to its own rank.
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = (first + second for first, second in zip(parts, parts[1:], strict=False))
        rank, at = min((ranks.get(pair, limit), i) for i, pair in enumerate(pairs))
        if rank >= limit:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _document(tokenizer: Tokenizer) -> dict[str, Any]:
    ranks = tokenizer._ranks
    by_rank = sorted(ranks, key=lambda token: ranks[token])
    pairs = (_last_merge(token, ranks) for token in by_rank if len(token) > 1)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}}
    split |= {"behavior": "Isolated", "invert": False}
    words = [split, {**level, "use_regex": False}]
    # Specials stand in the vocabulary too: otherwise a reader numbers them itself.
    vocab = {
        text.decode() if i in tokenizer._special_ids else _spell(text): i
        for i, text in tokenizer._bytes.items()
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": True}
            for text, i in tokenizer.specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "post_processor": {**level, "use_regex": True},
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [f"{_spell(a)} {_spell(b)}" for a, b in filter(None, pairs)],
        },
    }


def _refuse(reason: str) -> NoReturn:
    raise TokenizerError(reason)


def _read(path: Path) -> dict[str, Any]:
    """The arguments of Tokenizer from a tokenizer.json."""
    try:
        if path.stat().st_size > MAX_FILE:
            _refuse(f"larger than {MAX_FILE >> 20} MiB, no tokenizer.json")
        file = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        _refuse(error.strerror or "cannot be read")
    except UnicodeDecodeError:
        _refuse("is not UTF-8 text")
    except (ValueError, RecursionError) as error:
        _refuse(f"is not valid JSON ({error})")
    model = file.get("model") if isinstance(file, dict) else None
    if not isinstance(model, dict):
        _refuse("has no model, so it is no tokenizer.json")
    if model.get("type", "BPE") != "BPE":
        _refuse(f"its model is {model['type']!r}, expected byte-level BPE")
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    for key in (*odd, "fuse_unk", "byte_fallback"):
        if model.get(key):
            _refuse(f"its model sets {key}, which byte-level BPE has no use for")
    if file.get("normalizer") is not None:
        _refuse("it normalizes text, which would not survive decoding")
    vocab, merges, added = model.get("vocab"), model.get("merges"), file.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        _refuse("vocab, merges and added_tokens must be an object and two lists")
    specials = dict(map(_special, added))
    if len(specials) < len(added):
        _refuse("a special token is listed twice")
    pattern = _pattern(file.get("pre_tokenizer"))
    tokens = {
        _unspell(text): _id(i, text) for text, i in vocab.items() if specials.get(text, -1) != i
    }
    ranks = _ranks(tokens, merges, whole=model.get("ignore_merges") is True)
    return {
        "ranks": ranks,
        "specials": specials,
        "pattern": pattern,
        "ids": None if ranks == tokens else {rank: tokens[token] for token, rank in ranks.items()},
    }


def _id(value: object, text: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        _refuse(f"the token {text[:40]!r} has id {str(value)[:40]}, expected 0 to 2**31 - 1")
    return value


def _special(entry: object) -> tuple[str, int]:
    if not isinstance(entry, dict) or not isinstance(text := entry.get("content"), str):
        _refuse("an added token has no content")
    if not entry.get("special"):
        _refuse(f"the added token {text[:40]!r} is not special, so plain text could produce it")
    if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
        _refuse(f"the added token {text[:40]!r} matches more or less than its text")
    return text, _id(entry.get("id"), text)


def _pattern(steps: object) -> str:
    match steps:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, **split},
                {"type": "ByteLevel", **level},
            ],
        } if (
            split.get("behavior") == "Isolated"
            and not split.get("invert")
            and not level.get("add_prefix_space", True)
            and not level.get("use_regex", True)
        ):
            return pattern
    _refuse("its pre_tokenizer is not a regex Split followed by ByteLevel")


def _ranks(tokens: dict[bytes, int], merges: list[object], *, whole: bool) -> dict[bytes, int]:
    """Token -> rank, equal to its id where the merges allow it.

    ``whole``: a piece of text that is a token needs no merges (``ignore_merges``). Refuses merges
    that encoding by rank would not reproduce.
    """
    pairs: dict[bytes, set[tuple[bytes, bytes]]] = {}  # by result, in order of appearance
    last = b""
    for merge in merges:
        words = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(words, list) or len(words) != 2 or not all(map(_is_text, words)):
            _refuse(f"the merge {str(merge)[:80]!r} is not a pair of tokens")
        first, second = map(_unspell, words)
        result = first + second
        if not {first, second, result} <= tokens.keys():
            _refuse(f"the merge {str(merge)[:80]!r} uses or makes a token that is not in vocab")
        if result != last and result in pairs:
            _refuse(f"the merges that make {str(result)[:80]} do not follow one another")
        pairs.setdefault(result, set()).add((first, second))
        last = result

    alone = [token for token in tokens if token not in pairs]  # single bytes, or found whole
    if not whole and len(alone) > 256:
        _refuse(f"no merge makes {max(alone, key=len)!r}")
    order = [tokens[result] for result in pairs]
    ordered = order == sorted(order)
    ranks = tokens if ordered else {t: rank for rank, t in enumerate([*alone, *pairs])}
    for token in () if ranks == Tokenizer.o200k_harmony()._ranks else ranks:
        made = _last_merge(token, ranks) if len(token) > 1 else None
        if made not in pairs.get(token, ()) and (made or not whole and len(token) > 1):
            _refuse(f"its merges do not make {token!r} as encoding by rank would")
    return ranks


def _is_text(value: object) -> bool:
    return isinstance(value, str)
