"""Training in less memory: what is not being computed with lies on a shelf.

    optimizer     AdamW's moments, Muon's momentum
    parameters    these, all gradients, and the parameters of layers that are not at work

A layer's parameters are fetched while it computes, forwards and once more on the way back, where
its activations are computed again; a gradient is put away as soon as it is there; the optimiser
takes one parameter after another. No number changes: on a CPU a run is the same to the bit, and may
go on with or without. After ZeRO-Infinity, Rajbhandari et al. 2021, https://arxiv.org/abs/2104.07857
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptoss.model import model as wiring
from gptoss.train.config import TrainConfig
from gptoss.train.folder import restore
from gptoss.train.learner import Torch
from gptoss.train.ranks import ALONE, Ranks
from gptoss.train.shelf import Disk, Host, Shelf, large


def shelf_of(config: TrainConfig, path: Path | str) -> Shelf:
    """Main memory beside a GPU; else, or if a directory is named, files: in the run's own."""
    if config.offload_dir is None and config.device.startswith("cuda"):
        return Host()
    return Disk(config.offload_dir or path)


def learner_of(
    model: nn.Module,
    config: TrainConfig,
    path: Path | str,
    shelf: Shelf | None = None,
    ranks: Ranks = ALONE,
) -> Torch:
    """What trains a module as the config says; ``path``: the run's directory."""
    if not ranks.alone:
        from gptoss.train.sharded import Sharded  # seconds to import

        return Sharded(model, config, ranks)
    if config.offload is None:
        return Torch(model, config)
    return Offloaded(model, config, shelf or shelf_of(config, path))


def keeper(shelf: Shelf, device: str) -> Callable[[str, Tensor], Tensor]:
    """For ``Transformer.from_checkpoint``: large tensors of layers are put on the shelf."""

    def keep(name: str, x: Tensor) -> Tensor:
        return shelf.put(x) if name.startswith("block.") and large(x) else x.to(device)

    return keep


class Offloaded(Torch):
    """See the module, and ``Learner``.

    With "parameters" the loss must compute layers by ``layer``.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, shelf: Shelf) -> None:
        super().__init__(model, config)
        self.shelf, self.device = shelf, torch.device(config.device)
        self.streams = config.offload == "parameters"
        groups = [(o, group) for o in self.optimizers for group in o.param_groups]
        self.owner = {p: optimizer for optimizer, group in groups for p in group["params"]}
        self.scale: Tensor | None = None  # what clipping leaves of the gradients
        self._gradients: dict[Tensor, Tensor] = {}  # on the shelf
        self._known: set[Tensor] = set()  # whose gradient is of this step
        self._layers: list[list[tuple[Tensor, Tensor]]] = []  # a tensor, and where its numbers lie
        self._resting: set[Tensor] = set()  # these
        self._here: int | None = None  # the layer whose parameters have been fetched
        if self.streams:
            self.layer = self._computed
            blocks: Any = model.block
            self._layers = [self._away(block) for block in blocks]
            for name, p in model.named_parameters():
                if not name.startswith("block."):
                    p.data = p.data.to(self.device)
            self._resting = {x for layer in self._layers for x, _ in layer}
            for p in filter(large, self.owner):
                p.register_post_accumulate_grad_hook(self._put_gradient)

    def begin(self) -> None:
        """See ``Learner.begin``."""
        super().begin()
        self._known.clear()
        self.scale = None

    def learn(self, batch: Any, loss: Any) -> tuple[float, dict[str, float]]:
        """See ``Learner.learn``."""
        try:
            return super().learn(batch, loss)
        finally:
            self._fetch(None)

    def clip(self, longest: float) -> float:
        """See ``Learner.clip``. Gradients that lie on the shelf are shortened as they are used."""
        if not self.streams:
            return super().clip(longest)
        norms = []
        for p in filter(self.owner.__contains__, self.model.parameters()):
            if (gradient := self.gradient(p)) is not None:
                norms.append(torch.linalg.vector_norm(gradient).to(self.device))
                if p in self._known:
                    self.shelf.forget(gradient)
        if not norms:
            return 0.0
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        self.scale = torch.clamp(longest / (norm + 1e-6), max=1.0)
        return float(norm)

    def update(self, share: float) -> None:
        """See ``Learner.update``: parameter by parameter."""
        waiting = [(p, gradient) for p in self.owner if (gradient := self.gradient(p)) is not None]
        for p, _ in waiting:
            p.grad = None
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * share
        while waiting:
            p, gradient = waiting.pop(0)
            self._step(p, gradient.to(self.device))

    def restore(self, trained: dict[str, Tensor], optimized: list[Any]) -> None:
        """See ``Learner.restore``."""
        restore(self.model, trained)
        for optimizer, its in zip(self.optimizers, optimized, strict=True):
            optimizer.load_state_dict({**its, "state": {}})
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for index, state in its["state"].items():
                optimizer.state[params[index]] = {
                    name: self.shelf.put(x) if large(x) else x.to(self.device, copy=True)
                    for name, x in state.items()
                }
        self.shelf.forget()

    def _computed(self, w: Any, x: Tensor, positions: Tensor, index: int, *rest: Any) -> Tensor:
        """``model.decode_block`` of a layer that is fetched first, and again on the way back."""

        def fetched(*args: Any) -> Any:
            self._fetch(index)
            return wiring.decode_block(*args)

        args = (w, x, positions, index, *rest)
        found: Tensor
        found = checkpoint(fetched, *args, use_reentrant=False, preserve_rng_state=False)
        return found

    def _step(self, p: Tensor, gradient: Tensor) -> None:
        """The optimiser's step of one parameter, with all that belongs to it fetched."""
        optimizer, kept = self.owner[p], p.data
        if p in self._resting:
            p.data = self._fetched(kept)
        state = optimizer.state[p]
        resting = dict(state)
        state.update({name: self._fetched(x) for name, x in resting.items()})
        p.grad = gradient if self.scale is None else gradient * self.scale
        optimizer.step()
        p.grad = None
        state.update({name: self._back(x, resting.get(name)) for name, x in state.items()})
        if p in self._resting:
            p.data = self._back(p.data, kept)
        if p in self._known:
            self.shelf.forget(self._gradients[p])

    def _fetched(self, kept: Tensor) -> Tensor:
        return self.shelf.fetch(kept, self.device) if large(kept) else kept

    def _back(self, used: Tensor, kept: Tensor | None) -> Tensor:
        """``used``, put back to where it lay, if it has lain anywhere."""
        if not large(used):
            return used
        if kept is None:
            return self.shelf.put(used)
        self.shelf.store(kept, used)
        self.shelf.forget(kept)
        return kept

    def gradient(self, p: Tensor) -> Tensor | None:
        """Of this step, where it lies."""
        return self._gradients[p] if p in self._known else p.grad

    def _put_gradient(self, p: Tensor) -> None:
        """After backward has made ``p.grad``: add it to what lies there of this step."""
        assert p.grad is not None
        gradient, p.grad = p.grad, None
        if (kept := self._gradients.get(p)) is None:
            self._gradients[p] = self.shelf.put(gradient)
        else:
            kept.add_(gradient.to(kept.device)) if p in self._known else kept.copy_(gradient)
            self.shelf.forget(kept)
        self._known.add(p)

    def _away(self, block: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Put a layer's large tensors on the shelf, packed ones too."""
        found = []
        for x in (*block.parameters(), *block.buffers()):
            if large(x):
                x.data = self.shelf.put(x.data)
                found.append((x, x.data))
            else:
                x.data = x.data.to(self.device)
        return found

    def _fetch(self, index: int | None) -> None:
        """Have the parameters of one layer here, and no other's."""
        if index == self._here:
            return
        for x, kept in self._layers[self._here] if self._here is not None else ():
            x.data = kept
            self.shelf.forget(kept)
        for x, kept in self._layers[index] if index is not None else ():
            x.data = self.shelf.fetch(kept, self.device)
        self._here = index
