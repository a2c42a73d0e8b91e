"""A ``Learner`` of a module of which this process has a part: see ``divide.py``.

The optimisers are given plain tensors, this process's rows of each parameter. Muon alone needs
whole matrices: those of attention are gathered, and updated alike by all processes.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from gptoss.backends.torch.modules import Transformer
from gptoss.train.config import TrainConfig
from gptoss.train.divide import divide, grouped, heads_of, plan
from gptoss.train.learner import Torch
from gptoss.train.optimize import Muon, optimizers
from gptoss.train.pieces import Heads, Kept, Piece, read
from gptoss.train.ranks import Ranks


class Sharded(Torch):
    """See the module, and ``Learner``. Raises ValueError: the model cannot be divided so."""

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        assert isinstance(model, Transformer)
        divide(model, ranks)
        self.model: Transformer
        self.model, self.ranks = model, ranks
        self.held: dict[str, Any] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parts = {name: nn.Parameter(p.to_local().detach()) for name, p in self.held.items()}
        self.gathered: dict[str, nn.Parameter] = {}
        shown: Any = SimpleNamespace(named_parameters=self.parts.items)
        self.optimizers = optimizers(shown, config)
        self.names = {p: name for name, p in self.parts.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups if isinstance(optimizer, Muon) else ():
                group["params"] = [self._whole(p) if p.dim() == 2 else p for p in group["params"]]

    def begin(self) -> None:
        """See ``Learner.begin``."""
        self.model.zero_grad(set_to_none=True)
        super().begin()

    def clip(self, longest: float) -> float:
        """See ``Learner.clip``: over all processes, what several have alike counted once."""
        square = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for name, gradient in self._gradients():
            alike = 1 if "tensor" in plan(name) else self.ranks.tensor
            square += torch.linalg.vector_norm(gradient.float()).double().square() / alike
        dist.all_reduce(square)
        norm = square.sqrt().item()
        if norm > longest:
            for _, gradient in self._gradients():
                gradient.mul_(longest / (norm + 1e-6))
        return norm

    def update(self, share: float) -> None:
        """See ``Learner.update``."""
        for name, gradient in self._gradients():
            if name in self.gathered:
                self.gathered[name].grad = self._collect(name, gradient)
            else:
                self.parts[name].grad = gradient
        super().update(share)
        for name, p in self.gathered.items():
            self.parts[name].data.copy_(self._part(name, p.data))

    def trained(self) -> dict[str, Any]:
        """See ``Learner.trained``: in pieces."""
        return {name: self._piece(name, p.data) for name, p in self.parts.items()}

    def optimized(self) -> list[Any]:
        """See ``Learner.optimized``: in pieces, but for what is gathered."""
        found = []
        for optimizer in self.optimizers:
            its, names = optimizer.state_dict(), self._names(optimizer)
            each = its["state"].items()
            state = {i: {k: self._piece(names[i], x) for k, x in s.items()} for i, s in each}
            found.append(its | {"state": state})
        return found

    def restore(self, trained: dict[str, Any], optimized: list[Any]) -> None:
        """See ``Learner.restore``: whatever one process had, or any number of them."""
        wanted: dict[Kept, DTensor] = {}
        for name, x in trained.items():
            self._mine(name, x, self.parts[name].data, wanted)
        states = []
        for optimizer, its in zip(self.optimizers, optimized, strict=True):
            state: dict[int, dict[str, Tensor]] = {}
            for i, name in enumerate(self._names(optimizer)):
                each = its["state"].get(i, {})
                empty = {key: torch.empty_like(self._used(name)) for key in each}
                state[i] = {k: self._mine(name, x, empty[k], wanted) for k, x in each.items()}
            states.append({**its, "state": state})
        read(wanted)
        for name, p in self.gathered.items():
            p.data.copy_(self._collect(name, self.parts[name].data))
        for optimizer, its in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(its)

    @torch.no_grad()
    def collect(self, model: nn.Module) -> None:
        """Give a whole model, as this one was before it was divided, the parameters of now."""
        for name, p in model.named_parameters():
            if name in self.parts:
                whole, heads = self._collect(name, self.parts[name].data), self._heads(name)
                p.copy_(grouped(whole, heads, back=True) if heads else whole)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This process's part of each."""
        return ((n, p.grad.to_local()) for n, p in self.held.items() if p.grad is not None)

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        return [self.names[p] for group in optimizer.param_groups for p in group["params"]]

    def _used(self, name: str) -> Tensor:
        """What an optimiser updates."""
        return self.gathered.get(name, self.parts[name])

    def _whole(self, part: nn.Parameter) -> nn.Parameter:
        """A parameter of all processes' rows, for an optimiser in place of its part."""
        name = self.names[part]
        self.gathered[name] = whole = nn.Parameter(self._collect(name, part.data))
        self.names[whole] = name
        return whole

    def _piece(self, name: str, x: Tensor) -> Any:
        """What belongs to a parameter, as checkpoints have it; a number stays one."""
        heads = self._heads(name)
        if x.dim() == 0:
            return x
        if name in self.gathered and x.shape == self.gathered[name].shape:
            return grouped(x, heads, back=True) if heads else x
        return Piece(self._spread(name, x), heads)

    def _mine(self, name: str, x: Any, to: Tensor, wanted: dict[Kept, DTensor]) -> Tensor:
        """The other way around, into ``to``, or later from what is ``wanted``."""
        if isinstance(x, Kept):
            wanted[x] = self._spread(name, to)
            return to
        whole: Tensor = x
        if whole.dim() == 0:
            return whole
        whole = grouped(whole, heads) if (heads := self._heads(name)) else whole
        to.copy_(whole if whole.shape == to.shape else self._part(name, whole))
        return to

    def _heads(self, name: str) -> Heads:
        whole = name.endswith((".attn.qkv.weight", ".attn.qkv.bias"))
        return heads_of(self.model.config) if whole else None

    def _layout(self, name: str) -> tuple[DeviceMesh, list[Placement]]:
        """The last axis of a grid divides rows, the others what ``PLAN`` says."""
        mesh = self.ranks.sparse if ".experts." in name else self.ranks.dense
        axes: list[Placement] = [plan(name).get(a, Replicate()) for a in mesh.mesh_dim_names or ()]
        return mesh, [*axes[:-1], Shard(0)]

    def _spread(self, name: str, part: Tensor) -> DTensor:
        """A parameter's parts, or what belongs to them, as one tensor of all processes."""
        mesh, axes = self._layout(name)
        shape = list(self.held[name].shape)  # of what is divided by rows alone
        for size, axis in zip(mesh.shape[:-1], axes[:-1], strict=True):
            if isinstance(axis, Shard):
                shape[axis.dim] *= size
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, mesh, axes, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def _collect(self, name: str, part: Tensor) -> Tensor:
        """The whole of it, here; one axis after another, the last one first."""
        whole, (_, axes) = self._spread(name, part), self._layout(name)
        for i in reversed(range(len(axes))):
            axes[i] = Replicate()
            whole = whole.redistribute(placements=axes)
        return whole.to_local()

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        mesh, axes = self._layout(name)
        for place, size, axis in zip(mesh.get_coordinate() or (), mesh.shape, axes, strict=True):
            if isinstance(axis, Shard):
                parts = whole.chunk(size, axis.dim)
                whole = parts[place] if place < len(parts) else whole.narrow(axis.dim, 0, 0)
        return whole
