"""The canonical name, shape and dtype of every tensor, and the tree that ``model.py`` reads.

Names and layout are the original checkpoint's: queries, keys and values fused, gate and up rows
interleaved. Whatever a file calls a tensor, this is what it is called inside the house, and the
path of a weight in the tree is the path of the values beside it in a trace.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed

Stored = npt.NDArray[Any] | Packed  # an array (bfloat16, float32, ...) or packed experts
Read = Callable[[str], Stored]  # canonical name -> tensor; a checkpoint's ``read``, or a dict's get


@dataclass(frozen=True, slots=True)
class Spec:
    """What a checkpoint must hold under one canonical name."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["dense", "expert"]  # an expert's matrices may be packed


@dataclass(slots=True)
class Attention:
    """One layer's attention."""

    norm: Any  # [D]
    qkv: Any  # [(H + 2K) * d, D]
    qkv_bias: Any  # [(H + 2K) * d]
    sinks: Any  # [H]
    out: Any  # [D, H * d]
    out_bias: Any  # [D]


@dataclass(slots=True)
class Mixture:
    """One layer's router and experts."""

    norm: Any  # [D]
    gate: Any  # [E, D], the router
    gate_bias: Any  # [E]
    mlp1: Any  # [E, 2F, D], even rows gate, odd rows up
    mlp1_bias: Any  # [E, 2F]
    mlp2: Any  # [E, D, F]
    mlp2_bias: Any  # [E, D]


@dataclass(slots=True)
class Block:
    """One layer."""

    attn: Attention
    mlp: Mixture


@dataclass(slots=True)
class Weights:
    """All of them."""

    embedding: Any  # [V, D]
    block: list[Block]
    norm: Any  # [D]
    unembedding: Any  # [V, D]


# Attribute in the tree -> the tail of the canonical name.
ATTENTION = {
    "norm": "norm.scale",
    "qkv": "qkv.weight",
    "qkv_bias": "qkv.bias",
    "sinks": "sinks",
    "out": "out.weight",
    "out_bias": "out.bias",
}
MIXTURE = {
    "norm": "norm.scale",
    "gate": "gate.weight",
    "gate_bias": "gate.bias",
    "mlp1": "mlp1_weight",
    "mlp1_bias": "mlp1_bias",
    "mlp2": "mlp2_weight",
    "mlp2_bias": "mlp2_bias",
}
OUTSIDE = {
    "embedding": "embedding.weight",
    "norm": "norm.scale",
    "unembedding": "unembedding.weight",
}


def specs(c: ModelConfig) -> list[Spec]:
    """Every tensor of a model, in the order of the forward pass."""
    D, F, E, H = c.hidden_size, c.intermediate_size, c.num_experts, c.num_attention_heads
    layer: dict[str, tuple[int, ...]] = {
        "attn.norm.scale": (D,),
        "attn.qkv.weight": (c.qkv_size, D),
        "attn.qkv.bias": (c.qkv_size,),
        "attn.sinks": (H,),
        "attn.out.weight": (D, H * c.head_dim),
        "attn.out.bias": (D,),
        "mlp.norm.scale": (D,),
        "mlp.gate.weight": (E, D),
        "mlp.gate.bias": (E,),
        "mlp.mlp1_weight": (E, 2 * F, D),
        "mlp.mlp1_bias": (E, 2 * F),
        "mlp.mlp2_weight": (E, D, F),
        "mlp.mlp2_bias": (E, D),
    }
    return [
        Spec("embedding.weight", (c.vocab_size, D), "dense"),
        *(
            Spec(f"block.{i}.{name}", shape, "expert" if name.endswith("_weight") else "dense")
            for i in range(c.num_hidden_layers)
            for name, shape in layer.items()
        ),
        Spec("norm.scale", (D,), "dense"),
        Spec("unembedding.weight", (c.vocab_size, D), "dense"),
    ]


def build(c: ModelConfig, read: Callable[[str], Any]) -> Weights:
    """The tree, each leaf from ``read(canonical name)``, asked once and in order."""
    embedding = read(OUTSIDE["embedding"])
    blocks = [
        Block(
            Attention(**{a: read(f"block.{i}.attn.{n}") for a, n in ATTENTION.items()}),
            Mixture(**{a: read(f"block.{i}.mlp.{n}") for a, n in MIXTURE.items()}),
        )
        for i in range(c.num_hidden_layers)
    ]
    return Weights(embedding, blocks, read(OUTSIDE["norm"]), read(OUTSIDE["unembedding"]))


def random_weights(
    c: ModelConfig, seed: int = 0, dtype: Any = np.float32, scale: float = 0.5
) -> dict[str, npt.NDArray[Any]]:
    """Every tensor by name: well-behaved noise, drawn in float32 whatever ``dtype`` is.

    Matrices have standard deviation ``scale``, vectors 0.1, norms lie around one.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for spec in specs(c):
        noise = rng.standard_normal(spec.shape, np.float32)
        noise *= np.float32(scale if len(spec.shape) > 1 else 0.1)
        tensors[spec.name] = (noise + (spec.name.endswith("norm.scale"))).astype(dtype)
    return tensors
