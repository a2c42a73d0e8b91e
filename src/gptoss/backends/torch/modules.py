"""The classes people know. Each owns parameters; what it computes is ``model/model.py``.

>>> config = nano()
>>> RMSNorm(config.hidden_size)(x)          # any of them alone
>>> model = Transformer(config)
>>> logits = model(tokens)                  # [b, n] -> [b, n, V], causal, differentiable

``state_dict()`` speaks the canonical names of ``model/weights.py``, which are the original
checkpoint's. A router and an attention can be swapped for any callable.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptoss.backends.torch.cache import FullSequences, attend_whole
from gptoss.backends.torch.ops import PackedTensor, TorchOps, dtype_of, from_numpy
from gptoss.checkpoint.open import LAYOUTS, open_checkpoint
from gptoss.checkpoint.pieces import forget
from gptoss.model import model, weights
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed

__all__ = [
    "AttentionBlock",
    "Experts",
    "MLPBlock",
    "ModelConfig",
    "RMSNorm",
    "RotaryEmbedding",
    "TopKRouter",
    "Transformer",
    "TransformerBlock",
    "canonical_state_dict",
    "reset_parameters",
]

Router = Callable[[Tensor], tuple[Tensor, Tensor]]  # [T, D] -> chosen int [T, k], share [T, k]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int | None], Tensor]
"""(q [B, H, T, d], k and v [B, K, T, d], sinks [H], window) -> [B, H, T, d]."""
Mixer = Callable[[Tensor, Tensor, Tensor], Tensor]  # [T, D], chosen, share -> [T, D]


class ModuleOps(TorchOps):
    """``TorchOps`` that lets a module stand where the wiring expects a weight."""

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        """See ``Ops.linear``. A swapped router answers here, with its choice in place of scores."""
        return super().linear(x, weight, bias) if isinstance(weight, Tensor) else weight(x)

    def route(self, scores: Any, k: int) -> tuple[Tensor, Tensor]:
        """See ``Ops.route``."""
        return super().route(scores, k) if isinstance(scores, Tensor) else scores

    def experts(
        self, x: Tensor, w: Any, chosen: Tensor, share: Tensor, config: ModelConfig
    ) -> Tensor:
        """See ``Ops.experts``."""
        if w.mlp1_bias is not None:
            return super().experts(x, w, chosen, share, config)
        mixed: Tensor = w.mlp1(x, chosen, share)
        return mixed


OPS = ModuleOps()


class RMSNorm(nn.Module):
    """[..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """See ``Ops.rms_norm``."""
        return OPS.rms_norm(x, self.scale, self.eps)


class RotaryEmbedding(nn.Module):
    """Rotates queries [..., n, H, d] and keys [..., n, K, d] by their positions, 0 to n - 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Ops.rope``. ``positions``: int, shaped like q without its last two axes."""
        where = _positions(q.shape[:-2], q.device, positions)
        rotated = (OPS.rope(x.reshape(-1, *x.shape[-2:]), where, self.config) for x in (q, k))
        new_q, new_k = rotated
        return new_q.view(q.shape), new_k.view(k.shape)


class TopKRouter(nn.Module):
    """[T, D] -> chosen experts int [T, k] and their shares [T, k], best first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.k = config.experts_per_token
        self.weight = _zeros(config.num_experts, config.hidden_size)
        self.bias = _zeros(config.num_experts)
        reset_parameters(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Ops.route``."""
        return OPS.route(OPS.linear(x, self.weight, self.bias), self.k)


class Experts(nn.Module):
    """All the experts of one layer: [T, D], their choice and shares [T, k] -> [T, D].

    With ``packed`` the two matrices are MXFP4: a quarter of the memory, and not trainable.
    """

    mlp1_weight: Tensor | PackedTensor
    mlp2_weight: Tensor | PackedTensor

    def __init__(self, config: ModelConfig, *, packed: bool = False) -> None:
        super().__init__()
        D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
        make = PackedTensor.zeros if packed else _zeros
        self.config = config
        self.mlp1_weight = make(E, 2 * F, D)
        self.mlp1_bias = _zeros(E, 2 * F)
        self.mlp2_weight = make(E, D, F)
        self.mlp2_bias = _zeros(E, D)
        reset_parameters(self)

    @property
    def mlp1(self) -> Tensor | PackedTensor:
        """[E, 2F, D], the name the operations know."""
        return self.mlp1_weight

    @property
    def mlp2(self) -> Tensor | PackedTensor:
        """[E, D, F], the name the operations know."""
        return self.mlp2_weight

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """See ``Ops.experts``."""
        return OPS.experts(x, self, chosen, share, self.config)


class AttentionBlock(nn.Module):
    """Norm, attention and residual: [n, D] -> [n, D] or [b, n, D] -> [b, n, D].

    Args:
        config: the model's numbers.
        layer: which layer this is; even ones slide.
        attend: another attention; see ``Attend``.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, attend: Attend | None = None) -> None:
        super().__init__()
        D, H, d = config.hidden_size, config.num_attention_heads, config.head_dim
        self.config, self.layer, self.attend = config, layer, attend
        self.norm = RMSNorm(D, config.rms_norm_eps)
        self.qkv = nn.Linear(D, config.qkv_size)
        self.out = nn.Linear(H * d, D)
        self.sinks = _zeros(H)
        for own in (self.qkv, self.out):  # not ``attend``: a module there has started itself
            reset_parameters(own)

    def tree(self) -> weights.Attention:
        """The parameters by the names the wiring reads; a swapped part stands for its weights."""
        tree = weights.Attention(self.norm.scale, self.qkv, None, self.sinks, self.out, None)
        if type(qkv := self.qkv) is nn.Linear:
            tree.qkv, tree.qkv_bias = qkv.weight, qkv.bias
        if type(out := self.out) is nn.Linear:
            tree.out, tree.out_bias = out.weight, out.bias
        return tree

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Positions: int [n] or [b, n]; by default each row starts at 0."""
        flat, where = x.reshape(-1, x.shape[-1]), _positions(x.shape[:-1], x.device, positions)
        kv = _Rows(_lengths(x.shape[:-1]), {self.layer: self.attend})
        out: Tensor = model.attention(
            self.tree(), flat, where, self.layer, kv, OPS, self.config, model.no_trace
        )
        return x + out.view(x.shape)


class MLPBlock(nn.Module):
    """Norm, router, experts and residual: [n, D] -> [n, D] or [b, n, D] -> [b, n, D].

    Args:
        config: the model's numbers.
        router: another router: [T, D] -> int [T, k], [T, k].
        experts: other experts: ([T, D], int [T, k], [T, k]) -> [T, D].
    """

    def __init__(
        self, config: ModelConfig, router: Router | None = None, experts: Mixer | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate: Router = router or TopKRouter(config)
        self.experts: Mixer = experts or Experts(config)
        self.register_state_dict_post_hook(_leave_experts_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_put_experts_in)  # type: ignore[no-untyped-call]

    def tree(self) -> weights.Mixture:
        """The parameters by the names the wiring reads; a swapped part stands for its weights."""
        tree = weights.Mixture(self.norm.scale, self.gate, None, self.experts, None, None, None)
        if type(gate := self.gate) is TopKRouter:  # a subclass may compute something else
            tree.gate, tree.gate_bias = gate.weight, gate.bias
        if type(e := self.experts) is Experts:
            tree.mlp1, tree.mlp1_bias = e.mlp1_weight, e.mlp1_bias
            tree.mlp2, tree.mlp2_bias = e.mlp2_weight, e.mlp2_bias
        return tree

    def forward(self, x: Tensor) -> Tensor:
        """See ``model.mixture``."""
        flat = x.reshape(-1, x.shape[-1])
        out = model.mixture(self.tree(), flat, "mlp", OPS, self.config, model.no_trace)
        mixed: Tensor = x + out.view(x.shape)
        return mixed


class TransformerBlock(nn.Module):
    """One layer: [n, D] -> [n, D] or [b, n, D] -> [b, n, D]. See its two halves for arguments."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int = 0,
        attend: Attend | None = None,
        router: Router | None = None,
        experts: Mixer | None = None,
    ) -> None:
        super().__init__()
        self.attn = AttentionBlock(config, layer, attend)
        self.mlp = MLPBlock(config, router, experts)

    def tree(self) -> weights.Block:
        """The parameters by the names the wiring reads."""
        return weights.Block(self.attn.tree(), self.mlp.tree())

    def run(self, layer: Callable[..., Tensor], *rest: Any) -> Tensor:
        """``layer``, as ``model.forward`` takes it, with the parameters as they are at its turn."""
        return layer(self.tree(), *rest)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """See ``model.decode_block``."""
        mixed: Tensor = self.mlp(self.attn(x, positions))
        return mixed


class Transformer(nn.Module):
    """All of gpt-oss: tokens [n] -> logits [n, V], or [b, n] -> [b, n, V].

    Args:
        config: the model's numbers.
        router: makes one router a layer, from the config.
        attend: another attention, for every layer; see ``Attend``.
        packed: keep experts in MXFP4; see ``Experts``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        router: Callable[[ModelConfig], Router] = TopKRouter,
        attend: Attend | None = None,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.packed, self.ops = config, packed, OPS
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.block = nn.ModuleList(
            TransformerBlock(config, layer, attend, router(config), Experts(config, packed=packed))
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.unembedding = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for own in (self.embedding, self.unembedding):  # the other parts have started themselves
            reset_parameters(own)

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "bfloat16",
        *,
        packed: bool = True,
        keep: Callable[[str, Tensor], Tensor] | None = None,
    ) -> "Transformer":
        """The model in a checkpoint of any layout, in memory of its own.

        ``packed``: experts that are stored as MXFP4 stay so; False decodes them, to be trained.
        ``keep``: puts each tensor, as soon as it is read, to where it shall lie.

        Raises:
            ValueError: an unknown dtype.
            CheckpointError: nothing there, or not what it claims to be.
        """
        dtype = dtype_of(dtype)
        checkpoint = open_checkpoint(path)
        with torch.device("meta"):
            module = cls(checkpoint.config, packed=packed and checkpoint.layout.packed)
        state: dict[str, Tensor] = {}
        for spec in weights.specs(checkpoint.config):
            stored = checkpoint.read(spec.name)
            if not isinstance(stored, Packed):
                found = {
                    "": from_numpy(stored).to(
                        device, dtype, copy=True, memory_format=torch.contiguous_format
                    )
                }
            else:
                parts = (from_numpy(x.copy()) for x in (stored.blocks, stored.scales))
                tensor = PackedTensor(*parts).to(device)
                found = {f".{k}": v for k, v in tensor.state_dict().items()}
                found = found if module.packed else {"": tensor.decode(dtype)}
            for end, x in found.items():
                name = spec.name + end
                state[name] = x if keep is None else keep(name, x)
            forget(stored.blocks if isinstance(stored, Packed) else stored)  # the file's pages
        module.load_state_dict(state, assign=True)
        return module

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Also understands every checkpoint layout's names; see ``canonical_state_dict``."""
        state = canonical_state_dict(state_dict, self.config)
        if not self.packed:
            state = _unpacked(state, self.embedding.weight.dtype)
        return super().load_state_dict(state, strict, assign)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A fresh start for every part, swapped ones too: the function of this name."""
        reset_parameters(self, generator)

    def tree(self) -> weights.Weights:
        """The parameters by the names the wiring reads."""
        return weights.Weights(
            self.embedding.weight,
            [block.tree() for block in self.block],  # type: ignore[operator]
            self.norm.scale,
            self.unembedding.weight,
        )

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
        wanted: Tensor | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        layer: Callable[..., Tensor] | None = None,
        trace: model.Trace = model.no_trace,
    ) -> Tensor:
        """Logits of the token after each one.

        Args:
            tokens: int [n] or [b, n]. Attention is causal, so padding on the right needs no mask.
            positions: int [n] or [b, n], by default each row starts at 0.
            lengths: ``tokens`` [n] are rows of these lengths, one after another.
            wanted: int [W], indices into the flattened tokens; only their logits are computed.
            head: stands in for the unembedding: [W, D] -> what is returned.
            layer, trace: see ``model/model.py``.

        Returns:
            [n, V] or [b, n, V]; [W, V] when ``wanted`` is given; or what ``head`` returns.
        """
        where = _positions(tokens.shape, tokens.device, positions)
        if lengths is not None and positions is None:
            where = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
        blocks: Any = self.block
        tree = weights.Weights(
            self.embedding.weight, [*blocks], self.norm.scale, head or self.unembedding.weight
        )
        every = torch.arange(tokens.numel(), device=tokens.device)
        logits: Tensor = model.forward(
            tree,
            tokens.reshape(-1),
            where,
            every if wanted is None else wanted,
            kv=_Rows(
                _lengths(tokens.shape) if lengths is None else lengths,
                {i: block.attn.attend for i, block in enumerate(blocks)},
            ),
            ops=self.ops,
            config=self.config,
            trace=trace,
            layer=lambda block, *rest: block.run(layer or model.decode_block, *rest),
        )
        return logits.view(*tokens.shape, -1) if wanted is None and head is None else logits


def reset_parameters(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Matrices from a normal of deviation 0.02, norms one, biases and sinks zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1 and not name.endswith("bias"):
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("scale") else 0.0)


def canonical_state_dict(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """``state`` by canonical names, whichever layout it is in; names unknown to all are kept.

    Understands the original layout and Hugging Face's ``GptOssForCausalLM``, packed or not. Packed
    experts stay so, as ``<name>.blocks`` and ``<name>.scales``.
    """
    layouts = [layout for layout in LAYOUTS.values() if layout.name != "mlx"]
    entries = {e.name: e for layout in layouts for e in layout.entries(config)}
    new, rows = {}, defaultdict(list)
    for name, tensor in state.items():
        entry = entries.get(name)
        if entry is None:
            new[name] = tensor
        elif entry.part == "rows":
            rows[entry.canonical].append((entry.rows, tensor))
        elif entry.part == "transposed":
            new[entry.canonical] = tensor.mT
        else:
            half = "" if entry.part == "whole" else f".{entry.part}"
            new[entry.canonical + half] = tensor
    for name, parts in rows.items():
        new[name] = torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
    return new


def _unpacked(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``state`` with every pair of blocks and scales decoded."""
    new = dict(state)
    for name in [n.removesuffix(".blocks") for n in state if n.endswith(".blocks")]:
        if f"{name}.scales" in new:
            packed = PackedTensor(new.pop(f"{name}.blocks"), new.pop(f"{name}.scales"))
            new[name] = packed.decode(dtype)
    return new


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


class _Rows(FullSequences):
    """``FullSequences``, where a layer may bring its own attention."""

    def __init__(self, lengths: Sequence[int], attends: Mapping[int, Attend | None]) -> None:
        super().__init__(lengths)
        self.attends = attends

    def mix(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None
    ) -> Tensor:
        """See ``FullSequences.mix``."""
        return (self.attends[layer] or attend_whole)(q, k, v, sinks, window)


def _lengths(shape: torch.Size) -> list[int]:
    """Of the rows of [n] or [b, n]."""
    return [shape[-1]] * (shape[0] if len(shape) == 2 else 1)


def _positions(shape: torch.Size, device: torch.device, given: Tensor | None) -> Tensor:
    """int [T]: ``given``, or counted from 0 in each row of ``shape`` [n] or [b, n]."""
    where = torch.arange(shape[-1], device=device) if given is None else given
    return where.expand(shape).reshape(-1)


def _leave_experts_out(block: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Canonical names have no ``experts.`` before ``mlp1_`` and ``mlp2_``; other names stay."""
    inside = f"{prefix}experts."
    for name in [n for n in state if n.startswith((f"{inside}mlp1_", f"{inside}mlp2_"))]:
        state[prefix + name.removeprefix(inside)] = state.pop(name)


def _put_experts_in(block: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The other way around, while loading."""
    for name in [n for n in state if n.startswith((f"{prefix}mlp1_", f"{prefix}mlp2_"))]:
        state[f"{prefix}experts.{name.removeprefix(prefix)}"] = state.pop(name)
