"""Who holds what of a model that several processes train; ``model/model.py`` knows nothing of it.

Two things are divided, one after the other:

* what is computed: heads and experts, by ``PLAN``. A process then has smaller matrices, and the
  modules here send what must be sent: Megatron's tensor parallelism (Shoeybi et al. 2019,
  https://arxiv.org/abs/1909.08053), and experts to which tokens travel (Lepikhin et al. 2020,
  https://arxiv.org/abs/2006.16668);
* what is kept: each parameter that is left, by rows, over the processes that compute with the same
  (FSDP2). Layers are gathered when it is their turn, and forgotten.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from gptoss.backends.torch.modules import OPS, Experts, Transformer
from gptoss.model.config import ModelConfig
from gptoss.train.ranks import Ranks

PLAN = {  # part of a name: by which axes of the ranks' grids a parameter is divided, where
    ".attn.qkv.": {"tensor": Shard(0)},  # by key heads, each with its query heads: see ``grouped``
    ".attn.sinks": {"tensor": Shard(0)},
    ".attn.out.weight": {"tensor": Shard(1)},
    ".mlp.experts.": {"expert": Shard(0), "tensor": Shard(0)},
}


def plan(name: str) -> dict[str, Shard]:
    """What ``PLAN`` says of a parameter; nothing of most."""
    return next((axes for part, axes in PLAN.items() if part in name), {})


def divide(model: Transformer, ranks: Ranks) -> None:
    """Leave to this process its part of ``model``, which all have been given whole.

    Raises ValueError: heads or experts cannot be divided so.
    """
    check(model, ranks)
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # in which gradients are added up
    blocks: Any = model.block
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        if type(attn.qkv) is nn.Linear:  # with adapters it stays whole
            attn.qkv = Heads(attn.qkv, model.config, ranks)
        if ranks.tensor > 1:
            attn.out = Joined(attn.out, ranks)
            attn.sinks = mine(attn.sinks, ranks.tensor_place, ranks.tensor)
        if ranks.tensor * ranks.expert > 1:
            mlp.experts = Visited(mlp.experts, ranks)
        fully_shard(mlp.experts, mesh=ranks.sparse["data"], mp_policy=wide)
        fully_shard(block, mesh=ranks.dense["place"], mp_policy=wide)
        register_fsdp_forward_method(block, "run")
    fully_shard(model, mesh=ranks.dense["place"], mp_policy=wide)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the weights of a step add up to 1 as they are
            module.set_force_sum_reduction_for_comms(True)  # or NCCL would multiply by it
            module.set_reduce_scatter_unused_params(True, recurse=False)  # experts without visitors


def check(model: Transformer, ranks: Ranks) -> None:
    """Raises ValueError where ``model`` cannot be divided so."""
    config, experts = model.config, ranks.expert * ranks.tensor
    if config.num_key_value_heads % ranks.tensor:
        raise ValueError(
            f"tensor {ranks.tensor} does not divide the {config.num_key_value_heads} key heads "
            "of this model"
        )
    if config.num_experts % experts:
        axes = f"expert {ranks.expert}" + (f" by tensor {ranks.tensor}" if ranks.tensor > 1 else "")
        raise ValueError(f"{axes} does not divide the {config.num_experts} experts of this model")
    blocks: Any = model.block
    if ranks.tensor > 1 and type(blocks[0].attn.qkv) is not nn.Linear:
        raise ValueError("lora and tensor exclude each other: adapters of attention stay whole")


def heads_of(config: ModelConfig) -> tuple[int, int, int]:
    """H, K and d."""
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


def grouped(x: Tensor, heads: Sequence[int], *, back: bool = False) -> Tensor:
    """Rows [(H + 2K) * d, ...] of queries, keys, values -> of each key head its queries, its key,
    its value: however many heads come first, they are a whole attention. ``back``: back.
    """
    H, K, d = heads
    parts = torch.split(torch.arange((H + 2 * K) * d, device=x.device), [H * d, K * d, K * d])
    order = torch.cat([part.view(K, -1) for part in parts], dim=1).flatten()
    return x.index_select(0, order.argsort() if back else order)


def mine(p: Tensor, place: int, places: int, dim: int = 0) -> nn.Parameter:
    """What belongs to one of so many places, in memory of its own."""
    part = p.detach().chunk(places, dim)[place].clone()
    return nn.Parameter(part, requires_grad=p.requires_grad)


def enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """What all places have, and each does something else with: its gradients are added up."""
    if mesh.size() == 1:
        return x
    same = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return same.to_local(grad_placements=[Partial()])


def leave(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of what each place has; all go on with it."""
    if mesh.size() == 1:
        return x
    each = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return each.redistribute(placements=[Replicate()]).to_local()


class Heads(nn.Linear):
    """Queries, keys and values of the heads here: [T, D] -> [T, (H + 2K) * d]."""

    def __init__(self, whole: nn.Linear, config: ModelConfig, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.mesh, self.d = ranks.dense["tensor"], config.head_dim
        self.K = config.num_key_value_heads // ranks.tensor
        rows = [grouped(p.detach(), heads_of(config)) for p in (whole.weight, whole.bias)]
        self.weight, self.bias = (mine(p, ranks.tensor_place, ranks.tensor) for p in rows)
        self.requires_grad_(whole.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """In the order that ``model.attention`` reads."""
        qkv = F.linear(enter(x, self.mesh), self.weight, self.bias)
        each = qkv.view(len(x), self.K, -1)  # [T, K, (H / K + 2) * d]
        parts = torch.split(each, [each.shape[-1] - 2 * self.d, self.d, self.d], dim=-1)
        return torch.cat([part.flatten(1) for part in parts], dim=1)


class Joined(nn.Linear):
    """What the heads of all places say: [T, H * d] of those here -> [T, D]."""

    def __init__(self, whole: nn.Linear, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.mesh, self.bias = ranks.dense["tensor"], whole.bias
        self.weight = mine(whole.weight, ranks.tensor_place, ranks.tensor, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """The bias is added once."""
        return leave(F.linear(x, self.weight), self.mesh) + self.bias


class Visited(Experts):
    """Some of a layer's experts. Tokens of other places travel here, and ours to theirs."""

    def __init__(self, whole: Experts, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.config, self.ranks = whole.config, ranks
        self.each = whole.config.num_experts // (ranks.expert * ranks.tensor)
        for name in ("mlp1_weight", "mlp1_bias", "mlp2_weight", "mlp2_bias"):
            setattr(self, name, getattr(whole, name))
        here = (ranks.expert_place * ranks.tensor + ranks.tensor_place, ranks.expert * ranks.tensor)
        for module in self.modules():  # adapters and packed numbers, too
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, mine(p, *here))
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, mine(b, *here).data)

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """[T, D], int [T, k], [T, k] -> [T, D]."""
        ranks, mesh = self.ranks, self.ranks.dense["tensor"]
        x, share = enter(x, mesh), enter(share, mesh)
        visits = chosen.flatten()  # [T * k]
        ours = (visits // self.each % ranks.tensor == ranks.tensor_place).nonzero().squeeze(1)
        order = ours[visits[ours].argsort(stable=True)]  # by expert, and so by where it is
        hosts = visits[order] // (self.each * ranks.tensor)
        go = hosts.bincount(minlength=ranks.expert)
        come = self._travel(go).tolist()
        sent = go.tolist()
        experts = self._travel(visits[order] % self.each, sent, come)
        rows = self._travel(x.index_select(0, order // chosen.shape[1]), sent, come)
        one = rows.new_ones(len(rows), 1)
        rows = OPS.experts(rows, self, experts[:, None], one, self.config)
        rows = self._travel(rows, come, sent)
        each = rows.new_zeros(len(visits), x.shape[1]).index_copy(0, order, rows)
        each = each.view(*chosen.shape, -1) * share[..., None].to(rows.dtype)
        return leave(each.sum(dim=1), mesh).clone()  # FSDP would warn of a view

    def _travel(
        self, x: Tensor, sent: list[int] | None = None, come: list[int] | None = None
    ) -> Tensor:
        """Rows for the places of the expert axis, one after another -> the rows they sent here."""
        if self.ranks.expert == 1:
            return x
        group = self.ranks.sparse["expert"].get_group()
        return all_to_all_single_autograd(x.contiguous(), come, sent, group)
