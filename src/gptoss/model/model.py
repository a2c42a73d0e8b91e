"""gpt-oss, all of it.

This is the only place that says how the model is wired. It is written once and run by every
backend: ``ops`` computes, ``kv`` remembers, ``w`` holds the numbers. Read it top to bottom; there
is nothing underneath except the eight operations of ``ops.py``, whose NumPy definitions are in
``reference.py``.

``trace(name, x)`` is called on every value worth comparing between two implementations. Names are
the paths of the weights beside them (``weights.py``). It costs nothing when left out.
"""

from collections.abc import Callable
from typing import Any

from gptoss.model.config import ModelConfig
from gptoss.model.ops import KV, Array, Ops

Trace = Callable[[str, Array], None]


def no_trace(name: str, x: Array) -> None:
    """Compare nothing."""


def forward(
    w: Any,
    tokens: Array,
    positions: Array,
    wanted: Array,
    *,
    kv: KV,
    ops: Ops,
    config: ModelConfig,
    trace: Trace = no_trace,
    layer: Callable[..., Array] | None = None,
) -> Array:
    """Logits of the token after each wanted one.

    Args:
        w: weights, by the attribute names used below (``model/weights.py`` spells them out).
        tokens: int [T], the new tokens of all rows, one row after another.
        positions: int [T], each token's place in its own row.
        wanted: int [W], indices into ``tokens``.
        layer: ``decode_block`` with something around it: recomputed when training, or compiled.

    Returns:
        [W, V] logits, in the backend's compute dtype.
    """
    layer = layer or decode_block
    x = ops.gather(w.embedding, tokens)  # [T, D]
    trace("embedding", x)
    *blocks, last = w.block
    for i, block in enumerate(blocks):
        x = layer(block, x, positions, i, kv, ops, config, trace)  # [T, D]
    x = layer(last, x, positions, len(blocks), kv, ops, config, trace, wanted)
    x = ops.rms_norm(x, w.norm, config.rms_norm_eps)  # [W, D]
    trace("norm", x)
    logits = ops.linear(x, w.unembedding, None)  # [W, V]
    trace("logits", logits)
    return logits


def decode_block(
    w: Any,
    x: Array,
    positions: Array,
    layer: int,
    kv: KV,
    ops: Ops,
    config: ModelConfig,
    trace: Trace,
    wanted: Array | None = None,
) -> Array:
    """Attention, then the mixture of experts, each added to the residual stream.

    ``wanted`` (None: all): what follows the last attention is nobody's but each token's own. It is
    left out for the others, unless somebody traces it.
    """
    here = f"block.{layer}"
    x = x + ops.reduce(attention(w.attn, x, positions, layer, kv, ops, config, trace))  # [T, D]
    trace(f"{here}.attn", x)
    if wanted is not None and trace is no_trace:
        x, wanted = ops.gather(x, wanted), None  # [W, D]
    x = x + ops.reduce(mixture(w.mlp, x, f"{here}.mlp", ops, config, trace))  # [T, D]
    trace(here, x)
    return x if wanted is None else ops.gather(x, wanted)


def attention(
    w: Any,
    x: Array,
    positions: Array,
    layer: int,
    kv: KV,
    ops: Ops,
    config: ModelConfig,
    trace: Trace,
) -> Array:
    """Grouped-query attention with rotary positions and a learned sink per head."""
    here, d = f"block.{layer}.attn", config.head_dim
    H = w.sinks.shape[0]  # heads *here*: all of them, or this rank's share
    K = H * config.num_key_value_heads // config.num_attention_heads
    x = ops.rms_norm(x, w.norm, config.rms_norm_eps)  # [T, D]
    trace(f"{here}.norm", x)
    qkv = ops.linear(x, w.qkv, w.qkv_bias)  # [T, (H + 2K) * d]
    q = qkv[:, : H * d].reshape(-1, H, d)
    k = qkv[:, H * d : (H + K) * d].reshape(-1, K, d)
    v = qkv[:, (H + K) * d :].reshape(-1, K, d)
    q, k = ops.rope(q, positions, config), ops.rope(k, positions, config)
    trace(f"{here}.q", q)
    trace(f"{here}.k", k)
    trace(f"{here}.v", v)
    mixed = kv.attend(layer, q, k, v, w.sinks, config.window(layer))  # [T, H, d]
    trace(f"{here}.mixed", mixed)
    out = ops.linear(mixed.reshape(-1, H * d), w.out, w.out_bias)  # [T, D]
    trace(f"{here}.out", out)
    return out


def mixture(w: Any, x: Array, here: str, ops: Ops, config: ModelConfig, trace: Trace) -> Array:
    """Each token visits its k best experts; their answers are summed by router weight."""
    x = ops.rms_norm(x, w.norm, config.rms_norm_eps)  # [T, D]
    trace(f"{here}.norm", x)
    scores = ops.linear(x, w.gate, w.gate_bias)  # [T, E]
    trace(f"{here}.gate", scores)
    chosen, share = ops.route(scores, config.experts_per_token)  # [T, k], [T, k]
    trace(f"{here}.chosen", chosen)
    trace(f"{here}.share", share)
    out = ops.experts(x, w, chosen, share, config)  # [T, D]
    trace(f"{here}.out", out)
    return out
