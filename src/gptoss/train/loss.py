"""The log-probability of each next token, without ever holding all logits.

Of 4,096 tokens the logits of 201,088 words are 3.3 GB in float32, and their gradient as much again.
Here a few rows at a time are computed, used and forgotten, once on the way out and once on the way
back; what is kept is one number a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gptoss.backends.torch.modules import Transformer
from gptoss.backends.torch.ops import wide
from gptoss.model import model as wiring
from gptoss.train.batch import Batch
from gptoss.train.config import TrainConfig
from gptoss.train.routing import Routing

CHUNK = 1 << 24  # logits at a time
Layer = Callable[..., Any]  # what computes one: ``model.decode_block``, with something around it


def score(
    model: Transformer,
    batch: Batch,
    config: TrainConfig,
    routing: Routing | None = None,
    layer: Layer | None = None,
) -> Tensor:
    """float32 [W]: the log-probability of each of ``batch.targets``, differentiable.

    This is ``model/model.py``, as sampling runs it, with the loss in place of the unembedding.
    ``layer``: what computes a layer, if not the config says it.
    """
    device = model.unembedding.weight.device
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
        found: Tensor = model(
            batch.tokens,
            lengths=batch.lengths,
            wanted=batch.wanted,
            head=lambda x: logprobs(x, model.unembedding.weight, batch.targets),
            layer=layer or layer_of(config),
            trace=routing or wiring.no_trace,
        )
    return found


def cross_entropy(
    model: Transformer, batch: Batch, config: TrainConfig, layer: Layer | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The loss of supervised recipes: weighted surprise, and load balancing where it is asked for.

    ``layer``: see ``score``.

    Returns:
        The batch's share of the step's loss, and its share of the metrics.
    """
    routing = Routing(batch.parts, hollow=not batch.share)
    scored = score(model, batch, config, routing, layer)
    surprise = -(scored * batch.weights.to(scored.device)).sum()
    read = float(len(batch.tokens)) if batch.share else 0.0
    found = {"cross_entropy": surprise.item(), "tokens": read}
    found |= {name: value * batch.share for name, value in routing.statistics().items()}
    if config.balance:
        return surprise + config.balance * batch.share * routing.uneven(), found
    return surprise, found


def layer_of(config: TrainConfig) -> Layer:
    """What computes a layer: ``model.decode_block``, recomputed if the config says so."""
    return recomputed if config.recompute else wiring.decode_block


def recomputed(*args: Any) -> Any:
    """``model.decode_block`` that keeps nothing inside and is computed again on the way back."""
    return checkpoint(wiring.decode_block, *args, use_reentrant=False, preserve_rng_state=False)


def logprobs(x: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """``log_softmax(x @ table.T)`` at the targets: [W, D], [V, D], int [W] -> float32 [W].

    Products are computed in autocast's dtype, or that of ``x``; sums over words in float32.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    found: Tensor = _Logprobs.apply(x.to(dtype), table.to(dtype), targets)  # type: ignore[no-untyped-call]
    return found


class _Logprobs(torch.autograd.Function):
    """See ``logprobs``. Computes logits twice instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, CHUNK // len(table))
        sums, found = [], []
        for some, said in zip(torch.split(x, rows), torch.split(targets, rows), strict=True):
            logits = wide(some @ table.T)
            sums.append(logits.logsumexp(-1))
            found.append(logits.gather(-1, said[:, None]).squeeze(-1) - sums[-1])
        ctx.save_for_backward(x, table, targets, torch.cat(sums))
        ctx.rows = rows
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, table, targets, sums = ctx.saved_tensors
        by_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        by_table = torch.zeros_like(wide(table)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), ctx.rows):
            here = slice(start, start + ctx.rows)
            slope = wide(x[here] @ table.T).sub_(sums[here, None]).exp_()  # [rows, V]
            slope.mul_(-gradient[here, None])
            slope.scatter_add_(-1, targets[here, None], gradient[here, None])
            if by_x is not None:
                torch.mm(slope.to(table.dtype), table, out=by_x[here])
            if by_table is not None:
                by_table.addmm_(slope.T, wide(x[here]))
        return by_x, None if by_table is None else by_table.to(table.dtype), None
