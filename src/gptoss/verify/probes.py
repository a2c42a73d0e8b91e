"""The conformance kit's checkpoint and texts, which make every planted bug visible."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gptoss.checkpoint.save import save
from gptoss.llm.models import NANO
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK, Packed
from gptoss.model.weights import Read, Spec, Stored, specs
from gptoss.text.tokenizer import Tokenizer

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 130, 140, 170, 200, 260, 400, 600)

# The kit's own checkpoint: as in the released models, but what two layers can show.
PROBE = ModelConfig(
    num_hidden_layers=2,
    hidden_size=128,
    vocab_size=1024,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=8,
    experts_per_token=4,
    intermediate_size=128,
)
# Standard deviation (of matrices times sqrt(columns)) and mean, by the tail of the name: sinks that
# take probability, biases that matter, activations past the clamp, scores that are sharp.
VIVID = {
    "norm.scale": (0.1, 1.0),
    "attn.sinks": (2.0, 2.0),
    "attn.qkv.weight": (1.0, 0.0),
    "attn.out.weight": (1.0, 0.0),
    "mlp.gate.weight": (1.0, 0.0),
    "mlp.mlp1_weight": (4.0, 0.0),
    "mlp.mlp2_weight": (0.2, 0.0),
    "unembedding.weight": (2.0, 0.0),
    "embedding.weight": (11.0, 0.0),
    "mlp1_bias": (1.0, 0.0),
    "bias": (0.5, 0.0),
}


def probe_weights(config: ModelConfig = PROBE, seed: int = 0) -> Read:
    """Vivid tensors by canonical name, drawn when asked for."""
    table = {spec.name: spec for spec in specs(config)}
    order = {name: i for i, name in enumerate(table)}
    return lambda name: _vivid(table[name], np.random.default_rng([seed, order[name]]))


def _vivid(spec: Spec, rng: np.random.Generator) -> Stored:
    std, mean = next(size for tail, size in VIVID.items() if spec.name.endswith(tail))
    if len(spec.shape) > 1 and not spec.name.endswith("bias"):
        std /= spec.shape[-1] ** 0.5
    if spec.kind == "expert":
        groups = (*spec.shape[:-1], spec.shape[-1] // BLOCK)
        middle = 127 + round(np.log2(std / 2.9))  # 2.9: the standard deviation of the codes
        blocks = rng.integers(0, 256, (*groups, BLOCK // 2), np.uint8)
        return Packed(blocks, rng.integers(middle - 1, middle + 2, groups, np.uint8))
    x = rng.standard_normal(spec.shape, np.float32) * np.float32(std) + np.float32(mean)
    if spec.name == "embedding.weight":
        x[::3] *= np.float32(0.003)  # so small that the norm's epsilon counts
    narrow: npt.NDArray[Any] = x.astype(ml_dtypes.bfloat16)
    return narrow


def write_probe(path: Path | str, layout: str = "huggingface") -> Path:
    """The kit's checkpoint as files, with the vocabulary of nano. Errors as ``save``."""
    return save(PROBE, probe_weights(), path, layout, tokenizer_path=NANO / "tokenizer.json")


def prompts(tokenizer: Tokenizer, lengths: Sequence[int] = LENGTHS) -> list[str]:
    """Texts of so many tokens, the same every time; read back, they are the same tokens."""
    return [text for n in lengths for text in islice(_texts(tokenizer, n, n), 1)]


def _texts(tokenizer: Tokenizer, length: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    while True:
        text = "".join(draw.choices("etaoinshrdlucmfwyp0123456789     ", k=length))
        while len(tokens := tokenizer.encode(text)) < length:
            text += draw.choice("etaoinshrdlu ")
        if len(tokens) == length:
            yield text
