"""The independent judge: ``transformers``' GptOssForCausalLM, eager, float32, on our weights."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss import modeling_gpt_oss

from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed
from gptoss.model.weights import Stored
from tests.model.cases import Trace

OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
INSIDE = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight": "mlp.experts.gate_up_proj",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight": "mlp.experts.down_proj",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}


def transformers_model(
    config: ModelConfig, weights: dict[str, Stored]
) -> modeling_gpt_oss.GptOssForCausalLM:
    """The library's own model over our weights, which it shares wherever no copy is needed."""
    theirs = GptOssConfig.from_dict(config.to_json("huggingface", packed=False))
    theirs._attn_implementation = "eager"
    theirs._experts_implementation = "eager"
    with torch.device("meta"):
        model = GptOssForCausalLM(theirs)
    model.model.rotary_emb = modeling_gpt_oss.GptOssRotaryEmbedding(theirs)  # its tables are real
    shared: dict[int, torch.Tensor] = {}
    state = {}
    for name, stored in weights.items():
        state |= _renamed(name, stored, config, shared)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _renamed(
    name: str, stored: Stored, c: ModelConfig, shared: dict[int, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """One canonical tensor under the library's names, in its layout."""
    if name in OUTSIDE:
        return {OUTSIDE[name]: torch.from_numpy(stored)}
    _, layer, tail = name.split(".", 2)
    here = f"model.layers.{layer}."
    if tail.startswith("attn.qkv."):
        sizes = [n * c.head_dim for n in (c.num_attention_heads, *[c.num_key_value_heads] * 2)]
        parts = torch.from_numpy(stored).split(sizes)
        kind = tail.removeprefix("attn.qkv.")
        return {f"{here}self_attn.{x}_proj.{kind}": p for x, p in zip("qkv", parts, strict=True)}
    if isinstance(stored, Packed):
        if id(stored) not in shared:
            blocks, scales = torch.from_numpy(stored.blocks), torch.from_numpy(stored.scales)
            shared[id(stored)] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        return {here + INSIDE[tail]: shared[id(stored)]}
    x = torch.from_numpy(stored)
    return {here + INSIDE[tail]: x.transpose(1, 2) if tail.endswith("_weight") else x}


def transformers_trace(
    config: ModelConfig, weights: dict[str, Stored], rows: list[list[int]]
) -> Trace:
    """Every trace point, each row run alone, rows one after another."""
    model = transformers_model(config, weights)
    each = [_trace_row(model, row) for row in rows]
    return {name: np.concatenate([row[name] for row in each]) for name in each[0]}


def _trace_row(model: Any, row: list[int]) -> Trace:
    found: Trace = {}
    handles = [hook for hook in _hooks(model, found)]
    with torch.no_grad(), _attention_watched(found):
        found["logits"] = model(torch.tensor([row]), use_cache=False).logits[0].numpy()
    for handle in handles:
        handle.remove()
    return found


def _hooks(model: Any, found: Trace) -> Iterator[Any]:
    """One hook for each trace point that is some module's input or output."""

    def keep(name: str, x: torch.Tensor) -> None:
        found[name] = (x[0] if x.ndim == 3 else x).numpy()

    def output(module: Any, *names: str) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            for name, x in zip(names, out if isinstance(out, tuple) else (out,), strict=False):
                keep(name, x)

        return module.register_forward_hook(hook)

    def before(module: Any, name: str) -> Any:
        return module.register_forward_pre_hook(lambda _module, args: keep(name, args[0]))

    yield output(model.model.embed_tokens, "embedding")
    for i, layer in enumerate(model.model.layers):
        here = f"block.{i}"
        yield output(layer.input_layernorm, f"{here}.attn.norm")
        yield output(layer.self_attn, f"{here}.attn.out")
        yield before(layer.post_attention_layernorm, f"{here}.attn")
        yield output(layer.post_attention_layernorm, f"{here}.mlp.norm")
        names = (f"{here}.mlp.{tail}" for tail in ("gate", "share", "chosen"))
        yield output(layer.mlp.router, *names)
        yield output(layer.mlp, f"{here}.mlp.out")
        yield output(layer, here)
    yield output(model.model.norm, "norm")


@contextlib.contextmanager
def _attention_watched(found: Trace) -> Iterator[None]:
    """What goes into the eager attention function, and what comes out of it."""
    plain = modeling_gpt_oss.eager_attention_forward

    def watched(module: Any, q: Any, k: Any, v: Any, mask: Any, **rest: Any) -> Any:
        mixed, share = plain(module, q, k, v, mask, **rest)  # mixed is [1, T, H, d] already
        here = f"block.{module.layer_idx}.attn"
        for name, x in ("q", q), ("k", k), ("v", v):
            found[f"{here}.{name}"] = x[0].transpose(0, 1).numpy()  # [T, H, d]
        found[f"{here}.mixed"] = mixed[0].numpy()
        return mixed, share

    with mock.patch.object(modeling_gpt_oss, "eager_attention_forward", watched):
        yield


@contextlib.contextmanager
def stable_topk() -> Iterator[None]:
    """Of equal scores the lower index first, which ``torch.topk`` does not promise."""

    def topk(x: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
        return values[:, :k], indices[:, :k]

    with mock.patch.object(torch, "topk", topk):
        yield
