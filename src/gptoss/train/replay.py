"""Which experts a token visited when it was drawn; and the same experts when it is learned from.

Where sampler and trainer round differently, a router near a tie sends a token elsewhere, and its
log-probability jumps. Replayed, a token visits the recorded experts; their shares are those that
the trainer's own scores give them, so the router still learns.

Ma et al. 2025, https://arxiv.org/abs/2510.11370 (rollout routing replay)
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptoss.backends.protocol import Backend, Batch, Cache, Logits, Sampling
from gptoss.backends.torch.modules import OPS
from gptoss.model.model import Trace
from gptoss.train.routing import Routing

Chosen = npt.NDArray[np.int16]  # [T, L, k]: by token and layer, the experts


class Recorder:
    """A ``Backend`` that remembers which experts each token of a row visited."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.config = backend, backend.config
        self.closed: dict[tuple[int, ...], list[Chosen]] = defaultdict(list)  # by a row's tokens

    def chosen(self, tokens: Sequence[int]) -> Chosen:
        """[T, L, k] of a row of these tokens that is closed; rows of the same tokens take turns."""
        row = tuple(tokens)
        if found := self.closed.get(row):
            found.append(found.pop(0))
            return found[-1]
        # Its one token came from another row's last, before it had a slot of its own.
        return next(c[0][: len(row)] for r, c in self.closed.items() if r[: len(row)] == row)

    def new_cache(self, *, max_tokens: int) -> "RecordingCache":
        """See ``Backend.new_cache``."""
        return RecordingCache(self.backend.new_cache(max_tokens=max_tokens), self.closed)

    def forward(self, batch: Batch, cache: Cache, trace: Trace | None = None) -> Logits:
        """See ``Backend.forward``."""
        assert isinstance(cache, RecordingCache) and trace is None
        layers: list[Any] = []

        def keep(name: str, x: Any) -> None:
            if name.endswith(".mlp.chosen"):
                layers.append(x.cpu().numpy() if isinstance(x, Tensor) else x)

        logits = self.backend.forward(batch, cache.cache, keep)
        chosen = np.stack(layers, axis=1).astype(np.int16)
        starts, tokens = batch.starts.tolist(), batch.tokens.tolist()
        for r, slot in enumerate(batch.slots.tolist()):
            new = slice(starts[r], starts[r + 1])
            cache.rows[slot] += zip(tokens[new], chosen[new], strict=True)
        return logits

    def sample(
        self, logits: Logits, rules: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int]:
        """See ``Backend.sample``."""
        return self.backend.sample(logits, rules, uniforms)

    def to_numpy(self, logits: Logits) -> npt.NDArray[np.float32]:
        """See ``Backend.to_numpy``."""
        return self.backend.to_numpy(logits)


class RecordingCache:
    """A ``Cache`` with, beside each slot, its tokens and what they visited, [L, k] each."""

    def __init__(self, cache: Cache, closed: dict[tuple[int, ...], list[Chosen]]) -> None:
        self.cache, self.closed = cache, closed
        self.rows: dict[int, list[tuple[int, Chosen]]] = {}

    def open(self) -> int:
        """See ``Cache.open``."""
        slot = self.cache.open()
        self.rows[slot] = []
        return slot

    def reserve(self, slot: int, length: int) -> None:
        """See ``Cache.reserve``."""
        self.cache.reserve(slot, length)

    def truncate(self, slot: int, length: int) -> None:
        """See ``Cache.truncate``."""
        self.cache.truncate(slot, length)
        del self.rows[slot][length:]

    def fork(self, slot: int, length: int) -> int:
        """See ``Cache.fork``."""
        child = self.cache.fork(slot, length)
        self.rows[child] = self.rows[slot][:length]
        return child

    def close(self, slot: int) -> None:
        """See ``Cache.close``."""
        self.cache.close(slot)
        if row := self.rows.pop(slot):
            tokens, chosen = zip(*row, strict=True)
            self.closed[tokens].append(np.stack(chosen))


class _Replay:
    """``Ops`` of one layer whose tokens visit what is told: chosen int [T, k]."""

    def __init__(self, ops: Any, chosen: Tensor) -> None:
        self.ops, self.chosen = ops, chosen

    def route(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See ``Ops.route``: of the chosen ones alone, by their own scores."""
        order, share = self.ops.route(scores.gather(1, self.chosen), k)
        return self.chosen.gather(1, order), share

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)


def replaying(layer: Callable[..., Tensor], chosen: Tensor) -> Callable[..., Tensor]:
    """``layer`` (see ``model.forward``) whose tokens visit ``chosen``, int [T, L, k].

    The last layer is to be traced, or it computes the wanted tokens alone.
    """

    def run(w: Any, x: Tensor, positions: Tensor, i: int, kv: Any, ops: Any, *rest: Any) -> Tensor:
        return layer(w, x, positions, i, kv, _Replay(ops, chosen[:, i].long()), *rest)

    return run


@torch.no_grad()
def rerouted(routing: Routing) -> Tensor:
    """float32 [T]: the share of layers whose own choice of experts is not what a token visited."""
    found = []
    for name, scores in routing.seen.items():
        if name.endswith(".gate"):
            chosen = routing.seen[name.removesuffix("gate") + "chosen"]
            own, _ = OPS.route(scores, chosen.shape[1])
            found.append((own != chosen).any(dim=1))  # both best first by the same scores
    return torch.stack(found).float().mean(dim=0)
