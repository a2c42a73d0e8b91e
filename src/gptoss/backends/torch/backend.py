"""``Backend`` over torch tensors, on the CPU or one CUDA device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptoss.backends.protocol import Batch, Cache, Sampling
from gptoss.backends.sampling import sample_rows
from gptoss.backends.torch.cache import TorchCache, TorchView
from gptoss.backends.torch.modules import Transformer
from gptoss.backends.torch.ops import PackedTensor, TorchOps, dtype_of, from_numpy
from gptoss.errors import BackendUnavailable
from gptoss.model import model
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed
from gptoss.model.weights import Read, build


class TorchBackend:
    """Runs ``model.forward`` with ``TorchOps``.

    Experts stay as stored, packed or narrow, and are widened one matrix at a time. The rest is cast
    once. What needs no cast shares the memory of what ``read`` gave, so that on the CPU a bfloat16
    model is its mapped file.

    Raises:
        ValueError: an unknown dtype or device.
        BackendUnavailable: CUDA asked for on a machine without it.
    """

    def __init__(
        self, config: ModelConfig, read: Read, dtype: str = "bfloat16", device: str = "cpu"
    ) -> None:
        self.config, self.dtype, self.device = config, dtype_of(dtype), open_device(device)
        self.ops: TorchOps = TorchOps()

        def load(name: str) -> Any:
            stored = read(name)
            if isinstance(stored, Packed):
                return PackedTensor.of(stored, self.device)
            tensor = from_numpy(stored, self.device)
            expert = name.endswith(("mlp1_weight", "mlp2_weight"))
            return tensor if expert else tensor.to(self.dtype)

        self.weights = build(config, load)

    @classmethod
    def of(cls, module: Transformer) -> "TorchBackend":
        """Runs a module with the very tensors it trains, and its swapped parts: what is updated
        there is at once what is sampled from here.
        """
        backend = cls.__new__(cls)
        table = module.embedding.weight
        backend.config, backend.dtype, backend.device = module.config, table.dtype, table.device
        backend.ops, backend.weights = module.ops, module.tree()
        return backend

    def new_cache(self, *, max_tokens: int) -> TorchCache:
        """See ``Backend.new_cache``."""
        return TorchCache(self.config, max_tokens, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: Cache, trace: model.Trace | None = None) -> Tensor:
        """See ``Backend.forward``."""
        assert isinstance(cache, TorchCache)
        batch.check(self.config)
        ints = (batch.tokens, batch.positions, batch.wanted)
        logits: Tensor = model.forward(
            self.weights,
            *(torch.tensor(x, device=self.device) for x in ints),
            kv=TorchView(cache, batch),
            ops=self.ops,
            config=self.config,
            trace=trace or model.no_trace,
        )
        return logits

    def sample(
        self, logits: Tensor, rules: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int]:
        """See ``Backend.sample``."""
        return sample_rows(self.to_numpy(logits), rules, uniforms)

    def to_numpy(self, logits: Tensor) -> npt.NDArray[np.float32]:
        """See ``Backend.to_numpy``."""
        host: npt.NDArray[np.float32] = logits.float().cpu().numpy()
        return host


def open_device(name: str) -> torch.device:
    """The device called ``name``: "cpu", "cuda" or "cuda:1"."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"torch runs on cpu or cuda, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"{name!r} was asked for, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices on this machine."
        )
    return device
