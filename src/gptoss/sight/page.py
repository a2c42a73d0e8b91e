"""One HTML file that shows a conversation: no network, nothing beside it.

All that is said about the conversation, its words included, travels as one compressed block that
the script unpacks and writes as text, so that nothing a model says can become part of the page. A
policy in its head allows the page's own script and style by their hashes, and nothing else.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from gptoss.model.reference import NDArray
from gptoss.sight.look import Sight
from gptoss.sight.messages import spans, written
from gptoss.text.tokenizer import Tokenizer

MILLINATS = 1000.0  # log-probabilities are kept as so many of a nat below zero, in 16 bits


def page(sight: Sight, tokenizer: Tokenizer, title: str) -> str:
    """The page. ``title`` is the model's name, or whatever its reader should see on top."""
    style, script = _source("page.css"), _source("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    parts = {
        "title": html.escape(title),
        "policy": policy,
        "style": style,
        "script": script,
        "data": base64.b64encode(zlib.compress(packed(sight, tokenizer))).decode(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _source("page.html"))


def packed(sight: Sight, tokenizer: Tokenizer) -> bytes:
    """Everything: the length of a JSON header, the header, and the arrays that it lists.

    Little-endian, each array on a multiple of 4 from the end of the header.
    """
    readings = [sight.expected, *sight.lens]
    ids = np.unique(np.concatenate([sight.tokens, *(r.likeliest.ravel() for r in readings)]))
    arrays = _arrays(sight, ids)
    places, blocks, offset = {}, [], 0
    for name, array in arrays.items():
        block = array.tobytes()
        block += bytes(-len(block) % 4)
        places[name] = [array.dtype.name, offset, array.size]
        blocks.append(block)
        offset += len(block)
    config = sight.config
    header = {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "experts": config.num_experts,
        "visits": config.experts_per_token,
        "windows": [config.window(i) for i in range(config.num_hidden_layers)],
        "alternatives": sight.expected.likeliest.shape[1],
        "lens": sight.lens[0].likeliest.shape[1],
        "spans": [[s.label, s.start, s.body, s.stop] for s in spans(sight.tokens, tokenizer)],
        "words": [written(int(i), tokenizer) for i in ids],
        "arrays": places,
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 4)
    return len(head).to_bytes(4, "little") + head + b"".join(blocks)


def _arrays(sight: Sight, ids: NDArray) -> dict[str, NDArray]:
    """By name, in the smallest numbers that will do; a token is its place among ``ids``."""
    index = np.uint16 if len(ids) <= 1 << 16 else np.uint32
    experts = np.uint8 if sight.config.num_experts <= 256 else np.uint16
    arrays = {
        "ids": ids.astype(np.uint32),
        "tokens": np.searchsorted(ids, sight.tokens).astype(index),
        "chosen": sight.chosen.astype(experts),
        "share": _bytes(sight.share),
    }
    for name, readings in (("expected", [sight.expected]), ("lens", sight.lens)):
        arrays |= {
            f"{name}_token": _by_step(readings, "likeliest", lambda x: np.searchsorted(ids, x)),
            f"{name}_logprob": _by_step(readings, "logprobs", _millinats),
            f"{name}_came": _by_step(readings, "came", _millinats),
            f"{name}_rank": _by_step(readings, "rank", lambda x: x.astype(np.uint32)),
        }
        arrays[f"{name}_token"] = arrays[f"{name}_token"].astype(index)
    return arrays | _attention(sight)


def _attention(sight: Sight) -> dict[str, NDArray]:
    """Shares as bytes, and how many sources each head of each step has kept."""
    weight = np.stack([layer.weight for layer in sight.attention], axis=1)  # [T, L, H, SOURCES]
    where = np.stack([layer.where for layer in sight.attention], axis=1)
    kept = weight > 0
    return {
        "sink": _bytes(np.stack([layer.sink for layer in sight.attention], axis=1)),
        "sources": kept.sum(axis=-1).astype(np.uint8),
        "weight": _bytes(weight[kept]),
        "where": where[kept].astype(np.uint16),
    }


def _by_step(readings: Sequence[Any], name: str, as_stored: Any) -> NDArray:
    """[T, layers, ...] of one field."""
    return np.stack([as_stored(getattr(reading, name)) for reading in readings], axis=1)


def _bytes(share: NDArray) -> NDArray:
    return np.rint(share * 255).astype(np.uint8)


def _millinats(logprob: NDArray) -> NDArray:
    below = np.nan_to_num(-logprob, nan=0.0, posinf=65.0) * MILLINATS
    return np.rint(np.clip(below, 0, 65_535)).astype(np.uint16)


def _source(name: str) -> str:
    return files("gptoss.sight").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
