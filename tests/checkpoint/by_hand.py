"""Checkpoints written byte by byte, so that the reader is judged by none of its own code."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptoss.checkpoint.layout import Layout
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed
from gptoss.model.weights import random_weights, specs

TINY = ModelConfig(  # no two axes of a matrix alike
    num_hidden_layers=2,
    hidden_size=64,
    vocab_size=48,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=3,
    experts_per_token=2,
    intermediate_size=96,
    sliding_window=16,
    initial_context_length=256,
    rope_scaling_factor=8.0,
)
SPELLED = {
    "uint32": "U32",
    "bfloat16": "BF16",
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
    "float64": "F64",
}


def canonical(c: ModelConfig = TINY, seed: int = 0) -> dict[str, Any]:
    """Random weights by canonical name: bfloat16, and random bytes for experts."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = random_weights(c, seed, ml_dtypes.bfloat16)
    for spec in specs(c):
        if spec.kind == "expert":
            groups = (*spec.shape[:-1], spec.shape[-1] // 32)
            blocks = rng.integers(0, 256, (*groups, 16), np.uint8)
            found[spec.name] = Packed(blocks, rng.integers(110, 130, groups, np.uint8))
    return found


def stored(layout: Layout, weights: dict[str, Any], c: ModelConfig = TINY) -> dict[str, np.ndarray]:
    """The same weights as a file of this layout holds them."""
    found = {}
    for e in layout.entries(c):
        x, every = weights[e.canonical], slice(e.half, None, None if e.half is None else 2)
        match e.part:
            case "blocks":
                found[e.name] = x.blocks
            case "scales":
                found[e.name] = x.scales[:, every]
            case "words":
                raw = np.ascontiguousarray(x.blocks[:, every])
                found[e.name] = raw.reshape(*raw.shape[:2], -1).view("<u4")
            case "half":
                found[e.name] = x[:, every]
            case "rows":
                found[e.name] = x[slice(*e.rows)]
            case "transposed":
                found[e.name] = x.decode(ml_dtypes.bfloat16).transpose(0, 2, 1)
            case _:
                found[e.name] = x
    return found


def described(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """A header as JSON has it, and the body behind it."""
    header, body = {}, b""
    for name, x in tensors.items():
        raw = np.ascontiguousarray(x).tobytes()
        span = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": SPELLED[x.dtype.name], "shape": [*x.shape], "data_offsets": span}
        body += raw
    return header, body


def glued(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A file's bytes; ``length`` lies about the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    if length is None:
        raw += b" " * (-len(raw) % 8)
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.write_bytes(glued(*described(tensors)))
    return path


def write(folder: Path, layout: Layout, weights: dict[str, Any], *, shards: int = 0) -> Path:
    """A whole checkpoint directory; with ``shards``, split in so many files with an index."""
    folder.mkdir(exist_ok=True)
    tensors = stored(layout, weights)
    if not shards:
        save(folder / "model.safetensors", tensors)
    else:
        placed = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(tensors.items())[i::shards])
            save(folder / file, part)
            placed |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1.5}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    dialect = "original" if layout.name == "original" else "huggingface"
    config = TINY.to_json(dialect, packed=layout.packed)
    if layout.name == "mlx":
        config["quantization"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        config["quantization_config"] = config["quantization"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
