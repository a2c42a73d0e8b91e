"""llama.cpp's names for gpt-oss: the tensors and the keys of a GGUF of architecture ``gpt-oss``.

Gate and up are two tensors, queries, keys and values three. Matrices are bfloat16 or Q8_0, experts
MXFP4; vectors and the router are float32, which is all that llama.cpp reads there. It joins tokens
by merges alone: a word that is one token and no merge makes, as in the packaged model's vocabulary,
it spells letter by letter. o200k has none.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptoss.errors import CheckpointError
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK
from gptoss.model.weights import specs
from gptoss.text.tokenizer import O200K_PATTERN, Tokenizer

Dense = Literal["bf16", "q8_0"]
Kind = Literal["F32", "Q8_0", "BF16", "MXFP4"]

ARCHITECTURE = "gpt-oss"
# What llama.cpp computes with, whatever a file says.
FIXED = {"swiglu_limit": 7.0, "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}
OUTSIDE = {
    "embedding.weight": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "unembedding.weight": "output.weight",
}
INSIDE = {
    "attn.norm.scale": "attn_norm.weight",
    "attn.sinks": "attn_sinks.weight",
    "attn.out.weight": "attn_output.weight",
    "attn.out.bias": "attn_output.bias",
    "mlp.norm.scale": "post_attention_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.bias": "ffn_gate_inp.bias",
    "mlp.mlp2_weight": "ffn_down_exps.weight",
    "mlp.mlp2_bias": "ffn_down_exps.bias",
}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens
ENDS = {"bos": "<|startoftext|>", "eos": "<|return|>", "padding": "<|endoftext|>"}
WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file, and the part of a canonical tensor that it holds."""

    name: str
    canonical: str  # the canonical tensor it belongs to (model/weights.py)
    shape: tuple[int, ...]  # of its numbers, rows before columns; the file lists them backwards
    kind: Kind
    index: tuple[slice, ...] = ()  # of that tensor: some rows, or every other one


def tensors(config: ModelConfig, dense: Dense) -> list[Tensor]:
    """Every tensor, in the order of the forward pass."""
    d, H, K = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    edges = {"q": (0, H * d), "k": (H * d, (H + K) * d), "v": ((H + K) * d, (H + 2 * K) * d)}
    halves = {"gate": (WHOLE, slice(0, None, 2)), "up": (WHOLE, slice(1, None, 2))}
    matrix: Kind = "Q8_0" if dense == "q8_0" else "BF16"
    table = []
    for spec in specs(config):
        plain = len(spec.shape) == 1 or spec.name.endswith(("bias", "gate.weight"))
        kind: Kind = "F32" if plain else "MXFP4" if spec.kind == "expert" else matrix
        if spec.name in OUTSIDE:
            table.append(Tensor(OUTSIDE[spec.name], spec.name, spec.shape, kind))
            continue
        _, layer, tail = spec.name.split(".", 2)
        parts: dict[str, tuple[slice, ...]]
        if tail.startswith("attn.qkv."):
            end = tail.removeprefix("attn.qkv.")
            parts = {f"attn_{letter}.{end}": (slice(*edges[letter]),) for letter in edges}
        elif tail.startswith("mlp.mlp1_"):
            end = tail.removeprefix("mlp.mlp1_")
            parts = {f"ffn_{half}_exps.{end}": index for half, index in halves.items()}
        else:
            parts = {INSIDE[tail]: ()}
        for name, index in parts.items():
            shape = _cut(spec.shape, index)
            table.append(Tensor(f"blk.{layer}.{name}", spec.name, shape, kind, index))
    return table


def check(config: ModelConfig, table: list[Tensor]) -> None:
    """Refuse a model that llama.cpp would compute differently, or blocks that do not fit.

    Raises:
        CheckpointError: one of ``FIXED`` is another number, or columns no multiple of 32.
    """
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{name} is {getattr(config, name)}, but llama.cpp computes with {value} only; "
                "this model cannot become a GGUF"
            )
    for tensor in table:
        if tensor.kind in ("MXFP4", "Q8_0") and tensor.shape[-1] % BLOCK:
            raise CheckpointError(
                f"{tensor.name} has {tensor.shape[-1]} columns, but {tensor.kind} holds blocks of "
                f"{BLOCK}; " + ("choose bf16" if tensor.kind == "Q8_0" else "GGUF cannot hold them")
            )


def metadata(config: ModelConfig) -> dict[str, Any]:
    """Every key but the tokenizer's. Whole numbers are uint32, others float32."""
    c = config
    numbers: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.context_length,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "expert_feed_forward_length": c.intermediate_size,
        "expert_count": c.num_experts,
        "expert_used_count": c.experts_per_token,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.sliding_window": c.sliding_window,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope_theta),
        "rope.scaling.type": "yarn" if c.rope_scaling_factor > 1 else "none",
    }
    if c.rope_scaling_factor > 1:
        numbers |= {
            "rope.scaling.factor": float(c.rope_scaling_factor),
            "rope.scaling.original_context_length": c.initial_context_length,
            "rope.scaling.yarn_beta_fast": float(c.rope_ntk_beta),
            "rope.scaling.yarn_beta_slow": float(c.rope_ntk_alpha),
        }
    general = {
        "general.architecture": ARCHITECTURE,
        "general.quantization_version": 2,
        "general.file_type": 38,  # mostly MXFP4
    }
    return general | {f"{ARCHITECTURE}.{name}": value for name, value in numbers.items()}


def vocabulary(tokenizer: Tokenizer | None, size: int, room: Path) -> dict[str, Any]:
    """The tokenizer's keys; ids up to ``size`` that have no token are unused ones.

    None: a model that is run by token ids only. ``room`` is a directory for a passing file.

    Raises:
        CheckpointError: ids beyond ``size``, or text is cut otherwise than llama.cpp cuts it.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if tokenizer.pattern != O200K_PATTERN:
        raise CheckpointError("llama.cpp has no name for the pattern by which the tokenizer cuts")
    if tokenizer.vocab_size > size:
        raise CheckpointError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size is {size}"
        )
    file = room / "tokenizer.json"
    tokenizer.save(file)
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    file.unlink()
    names = [f"[PAD{i}]" for i in range(size)]
    kinds = np.full(size, UNUSED, np.int32)
    for text, i in model["vocab"].items():
        names[i] = text
        kinds[i] = CONTROL if text in tokenizer.specials else NORMAL
    ends = {
        f"tokenizer.ggml.{end}_token_id": tokenizer.specials[name]
        for end, name in ENDS.items()
        if name in tokenizer.specials
    }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": model["merges"],
        **ends,
        "tokenizer.ggml.add_bos_token": False,
    }


def _cut(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    """``shape`` after indexing."""
    cut = [len(range(*s.indices(n))) for n, s in zip(shape, index, strict=False)]
    return (*cut, *shape[len(cut) :])
