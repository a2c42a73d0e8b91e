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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
O200K_PACKED_SHA256 = "0"  # the unpacked asset
O200K_ASSET = Path(__file__).parent.parent / "assets" / "o200k.xz"
HARMONY_SPECIALS = {
    **{f"<|reserved_{i}|>": i for i in range(200_000, 201_088)},
}
STOP_NAMES = ("<|return|>", "<|call|>", "<|endoftext|>")
