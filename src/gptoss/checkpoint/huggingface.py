"""The Hugging Face layouts: ``GptOssForCausalLM``'s names, experts packed or in bfloat16.

Queries, keys and values are three tensors. Packed experts lie as in the original layout;
dequantised ones are TRANSPOSED against it: ``gate_up_proj`` [E, D, 2F] and ``down_proj`` [E, F, D].
"""

from gptoss.checkpoint.layout import Entry, Layout
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK
from gptoss.model.weights import specs

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


def entries(config: ModelConfig, *, packed: bool) -> list[Entry]:
    """Every tensor of the packed or the bfloat16 layout."""
    d, H, K = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    edges = {"q": (0, H * d), "k": (H * d, (H + K) * d), "v": ((H + K) * d, (H + 2 * K) * d)}
    table = []
    for spec in specs(config):
        if spec.name in OUTSIDE:
            table.append(Entry(OUTSIDE[spec.name], spec.shape, spec.name, "whole"))
            continue
        _, layer, tail = spec.name.split(".", 2)
        here = f"model.layers.{layer}."
        if tail.startswith("attn.qkv."):
            kind = tail.removeprefix("attn.qkv.")
            for letter, (a, b) in edges.items():
                name = f"{here}self_attn.{letter}_proj.{kind}"
                table.append(Entry(name, (b - a, *spec.shape[1:]), spec.name, "rows", (a, b)))
        elif spec.kind == "dense":
            table.append(Entry(here + INSIDE[tail], spec.shape, spec.name, "whole"))
        elif packed:
            name, scales = here + INSIDE[tail], (*spec.shape[:-1], spec.shape[-1] // BLOCK)
            table.append(Entry(f"{name}_blocks", (*scales, BLOCK // 2), spec.name, "blocks"))
            table.append(Entry(f"{name}_scales", scales, spec.name, "scales"))
        else:
            E, rows, columns = spec.shape
            table.append(Entry(here + INSIDE[tail], (E, columns, rows), spec.name, "transposed"))
    return table


HUGGINGFACE = Layout("huggingface", True, lambda c: entries(c, packed=True))
HUGGINGFACE_BF16 = Layout("huggingface-bf16", False, lambda c: entries(c, packed=False))
