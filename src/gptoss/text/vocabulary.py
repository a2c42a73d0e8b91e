"""Vocabularies on disk: the packaged o200k and Hugging Face's ``tokenizer.json``.

Reads and writes tables of tokens; encodes nothing. Executes nothing from a file, and refuses one
that encoding by rank (see tokenizer.py) would not reproduce token for token.
"""

import base64
import hashlib
import json
import lzma
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from gptoss.errors import TokenizerError

O200K_SIZE = 199_998  # ordinary tokens
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"  # the rank file
O200K_PACKED_SHA256 = "440741350e7cfa1c0f4869ce742d1b043550adbda5187adcac9e787edac6fba9"
O200K_ASSET = Path(__file__).parent.parent / "assets" / "o200k.xz"

MAX_FILE = 256 << 20  # bytes of a tokenizer.json; the largest published ones have about 35 MB
MAX_TOKEN = 512  # bytes of one token; o200k's longest has 128


def unpack_ranks(packed: bytes) -> Iterator[bytes]:
    """The asset's format: one byte per token with its length, then all tokens' bytes, by rank."""
    at = O200K_SIZE
    for length in packed[:O200K_SIZE]:
        yield packed[at : at + length]
        at += length


@cache
def o200k_ranks() -> dict[bytes, int]:
    """Token -> rank of o200k's 199,998 ordinary tokens, in order; shared, not to be changed.

    Raises TokenizerError when the packaged file is missing or damaged.
    """
    try:
        packed = lzma.decompress(O200K_ASSET.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise TokenizerError(f"{O200K_ASSET}: {error}; reinstall the package") from None
    if hashlib.sha256(packed).hexdigest() != O200K_PACKED_SHA256:
        raise TokenizerError(f"{O200K_ASSET}: not the o200k vocabulary; reinstall the package")
    return {token: rank for rank, token in enumerate(unpack_ranks(packed))}


def o200k_rank_file() -> bytes:
    """The text of ``o200k_base.tiktoken``, which other libraries read: lines ``base64 rank``."""
    rows = o200k_ranks().items()
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in rows)


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


def write(
    path: Path,
    ranks: Mapping[bytes, int],
    ids: Mapping[int, int] | None,
    specials: Mapping[str, int],
    pattern: str,
) -> None:
    """A ``tokenizer.json``; arguments as Tokenizer's. o200k takes 3 s and 7.5 MB."""
    by_rank = sorted(ranks, key=lambda token: ranks[token])
    pairs = (_last_merge(token, ranks) for token in by_rank if len(token) > 1)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": pattern}}
    split |= {"behavior": "Isolated", "invert": False}
    words = [split, {**level, "use_regex": False}]
    # Specials stand in the vocabulary too: otherwise a reader numbers them itself.
    vocab = {_spell(token): ranks[token] if ids is None else ids[ranks[token]] for token in by_rank}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": True} for text, i in specials.items()
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
            "vocab": vocab | dict(specials),
            "merges": [f"{_spell(a)} {_spell(b)}" for a, b in filter(None, pairs)],
        },
    }
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _refuse(reason: str) -> NoReturn:
    raise TokenizerError(reason)


def read(path: Path) -> tuple[dict[bytes, int], dict[int, int] | None, dict[str, int], str]:
    """Ranks, ids, specials and pattern, as Tokenizer takes them, from a ``tokenizer.json``.

    Raises TokenizerError, without the path, for anything that is not plain byte-level BPE.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            _refuse(f"is larger than {MAX_FILE >> 20} MiB, so it is no tokenizer.json")
        file = json.loads(raw.decode())
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
        _unspell(text): _id(i, text)
        for text, i in vocab.items()
        if text not in specials or specials[text] != i
    }
    ranks = _ranks(tokens, merges, whole=model.get("ignore_merges") is True)
    ids = None if ranks == tokens else {rank: tokens[token] for token, rank in ranks.items()}
    return ranks, ids, specials, pattern


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
    # Each token of o200k is made by its merges: known, and 2 s to find out again.
    for token in () if len(ranks) == O200K_SIZE and ranks == o200k_ranks() else ranks:
        made = _last_merge(token, ranks) if len(token) > 1 else None
        if made not in pairs.get(token, ()) and (made or not whole and len(token) > 1):
            _refuse(f"its merges do not make {token!r} as encoding by rank would")
    return ranks


def _is_text(value: object) -> bool:
    return isinstance(value, str)
