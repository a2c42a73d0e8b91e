"""Numbers that depend on a token and its past alone: the sampler's are the trainer's, to the bit.

Products of other shapes add in other orders, so a token decoded from a cache and the same token in
a packed batch differ in the last bits. The compiled core adds in one order, whatever else is in the
step (``csrc/README.md``). So answers are drawn by the native backend, over the memory of the very
tensors that are trained, and here the trainer's forward numbers come from the same kernels, while
gradients are those of the ordinary operations at the same point.

For plain float32 parameters on a CPU. An operation that is missing here is one whose numbers each
come from a fixed sequence of rounded operations in torch too: a lookup, a sum of two.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptoss.backends import load_backend
from gptoss.backends.native.cache import attend_whole
from gptoss.backends.native.ops import NativeOps, weight
from gptoss.backends.protocol import Backend
from gptoss.backends.torch import cache
from gptoss.backends.torch.modules import OPS, ModuleOps, Transformer, TransformerBlock
from gptoss.engine.draw import log_softmax
from gptoss.model.config import ModelConfig
from gptoss.model.weights import Mixture, specs
from gptoss.train import loss
from gptoss.train.config import TrainConfig


def make_invariant(model: Transformer, config: TrainConfig) -> Backend:
    """Let the model compute what depends on a token and its past alone, and the backend that
    draws from it; both as long as its parameters stay where they are in memory.

    Raises:
        ValueError: they are not plain, or not float32 on a CPU.
    """
    state, blocks = model.state_dict(), cast(list[TransformerBlock], list(model.block))
    wide = all(x.dtype is torch.float32 and x.device.type == "cpu" for x in state.values())
    published = {spec.name for spec in specs(model.config)} == set(state)
    if config.autocast or not (wide and published) or any(b.attn.attend for b in blocks):
        raise ValueError(
            "batch_invariant needs all parameters as published, in float32 on a cpu: leave out "
            "lora, qat, autocast, dtype and device"
        )
    model.ops = InvariantOps()
    for block in blocks:
        block.attn.attend = attend
    threads = config.threads or torch.get_num_threads()
    return load_backend(
        "native", model.config, lambda name: host(state[name]), precision="exact", threads=threads
    )


class InvariantOps(ModuleOps):
    """``Ops`` with the numbers of ``NativeOps`` and the gradients of ``ModuleOps``."""

    def __init__(self) -> None:
        self.native = NativeOps()
        self.where: tuple[Tensor, npt.NDArray[Any]] | None = None  # positions, here and there

    def rms_norm(self, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        """See ``Ops.rms_norm``."""
        found = self.native.rms_norm(host(x), host(scale), eps)
        return instead(found, lambda: OPS.rms_norm(x, scale, eps))

    def linear(self, x: Tensor, w: Any, bias: Tensor | None) -> Any:
        """See ``Ops.linear``."""
        if not isinstance(w, Tensor):  # what stands for the unembedding
            return w(x)
        found = self.native.linear(host(x), weight(host(w)), None if bias is None else host(bias))
        return instead(found, lambda: OPS.linear(x, w, bias))

    def rope(self, x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
        """See ``Ops.rope``."""
        if self.where is None or self.where[0] is not positions:
            self.where = positions, host(positions)  # one array a step, so tables are made once
        found = self.native.rope(x.detach().numpy(), self.where[1], config)
        return instead(found, lambda: OPS.rope(x, positions, config))

    def route(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See ``Ops.route``."""
        chosen, share = self.native.route(host(scores), k)
        return torch.from_numpy(chosen).long(), instead(share, lambda: OPS.route(scores, k)[1])

    def experts(
        self, x: Tensor, w: Any, chosen: Tensor, share: Tensor, config: ModelConfig
    ) -> Tensor:
        """See ``Ops.experts``."""
        mlp1, mlp2 = weight(host(w.mlp1)), weight(host(w.mlp2))
        there = Mixture(None, None, None, mlp1, host(w.mlp1_bias), mlp2, host(w.mlp2_bias))
        visits = host(chosen).astype(np.int32)
        found = self.native.experts(host(x), there, visits, host(share), config)
        return instead(found, lambda: OPS.experts(x, w, chosen, share, config))


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """See ``modules.Attend``."""
    B, H, T, d = q.shape
    rq, rk, rv = (host(x.transpose(1, 2).reshape(B * T, -1, d)) for x in (q, k, v))
    mixed = attend_whole(rq, rk, rv, host(sinks), window, [T] * B)  # [B * T, H, d]
    found = mixed.reshape(B, T, H, d).swapaxes(1, 2)
    return instead(found, lambda: cache.attend_whole(q, k, v, sinks, window))


def logprobs(x: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """See ``loss.logprobs``: by what the engine says of a token that it draws."""
    native, matrix, found = NativeOps(), weight(host(table)), np.empty(len(x), np.float32)
    rows = max(1, loss.CHUNK // len(table))
    for start in range(0, len(x), rows):
        logits = native.linear(host(x[start : start + rows]), matrix, None)
        for i, row in enumerate(logits, start):
            found[i] = log_softmax(row)[int(targets[i])]
    return instead(found, lambda: loss.logprobs(x, table, targets))


def instead(found: npt.NDArray[np.float32], ordinary: Callable[[], Tensor]) -> Tensor:
    """``found``, with the gradient of what ``ordinary`` computes."""
    numbers = torch.from_numpy(found)
    if not torch.is_grad_enabled():
        return numbers
    replaced: Tensor = _Instead.apply(numbers, ordinary())  # type: ignore[no-untyped-call]
    return replaced


class _Instead(torch.autograd.Function):
    """The numbers of the first with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, ordinary: Tensor) -> Tensor:
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def host(x: Tensor) -> npt.NDArray[Any]:
    """The same memory, where it lies row after row."""
    found: npt.NDArray[Any] = x.detach().contiguous().numpy()
    return found
