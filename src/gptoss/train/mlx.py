"""Adapters trained by MLX: the same data, files and export as torch's, on a Mac's GPU.

    sft("openai/gpt-oss-20b", ["chats.jsonl"], "runs/mac", config=TrainConfig(device="gpu"))

A run's checkpoints hold the adapters by the names and shapes that ``lora.py`` gives them.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.optimizers import AdamW
from torch import Tensor

from gptoss.backends.mlx.backend import MlxBackend, readable
from gptoss.backends.mlx.lora import adapted, adapters, logprobs, recomputed
from gptoss.checkpoint.open import Checkpoint
from gptoss.train.batch import Batch
from gptoss.train.config import Reading, TrainConfig, Tuning
from gptoss.train.plan import Plan, make_plan
from gptoss.train.recipes import Looked, Watch, checkpoint_of, gathered
from gptoss.train.routing import Routing
from gptoss.train.trainer import Trainer

OBEYED = {  # of TrainConfig; the others are torch's
    *("steps", "lr", "weight_decay", "beta1", "beta2", "warmup", "schedule", "decay", "floor"),
    *("clip", "seed", "save_every", "keep", "milestone", "device", "tensorboard", "force"),
    "recompute",
}


def sft(
    model: Path | str,
    data: Sequence[Path | str],
    path: Path | str,
    *,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    reading: Reading = Reading(),  # noqa: B008
    tuning: Tuning = Tuning(lora=8),  # noqa: B008
    watch: Watch | None = None,
    looked: Looked | None = None,
) -> Trainer[Batch]:
    """Train adapters of a checkpoint on conversations; arguments and errors as ``recipes.sft``.

    Raises ValueError for what only torch trains. Memory is refused only where it cannot be enough.
    """
    check(config, tuning)
    asked: dict[str, Any] = {"recipe": "sft", "model": str(model), "tokenizer": None}
    asked |= {**asdict(tuning), "backend": "mlx"}
    opened = checkpoint_of(asked)
    if not config.force:
        least(opened, path, config, tuning, reading.tokens).check()
    corpus = gathered(asked, data, path, reading, config.seed, looked)
    how = {"dtype": tuning.dtype, "device": config.device}
    learner = Adapters(MlxBackend(opened.config, opened.read, **how), config, tuning)
    opened.release()
    trainer: Trainer[Batch] = Trainer(
        learner, config, path, asked=asked | asdict(reading), watch=watch
    )
    trainer.run(
        lambda position: corpus.draw(position, tokens=reading.tokens, batches=reading.accumulate),
        lambda batch: cross_entropy(learner, batch),
    )
    return trainer


def check(config: TrainConfig, tuning: Tuning) -> None:
    """Raise ValueError unless it is adapters that are to be trained, and as MLX can."""
    if not tuning.lora:
        raise ValueError("MLX trains adapters only: say --lora RANK, or train with torch")
    if torch.distributed.is_torchelastic_launched():
        raise ValueError("torchrun is torch's: MLX trains in one process")
    for one in fields(config):
        if one.name not in OBEYED and getattr(config, one.name) != one.default:
            raise ValueError(f"{one.name} is torch's: MLX trains adapters by AdamW alone")


def least(
    opened: Checkpoint, path: Path | str, config: TrainConfig, tuning: Tuning, tokens: int
) -> Plan:
    """What torch would take, in memory that a Mac's GPU shares with its CPU: MLX takes no less."""
    how = (path, replace(config, device="cpu"), tuning, tokens)
    plan = make_plan(str(opened.path), opened.config, *how, packed=opened.layout.packed)
    return replace(plan, savings=tuple(one for one in plan.savings if "--offload" not in one))


class Adapters:
    """A ``Learner``: low-rank adapters of a checkpoint, and MLX's AdamW."""

    def __init__(self, backend: MlxBackend, config: TrainConfig, tuning: Tuning) -> None:
        self.backend, self.config, self.scale = backend, config, tuning.alpha / tuning.lora
        with mx.stream(backend.device):
            self.values = adapters(backend.config, tuning.lora, config.seed)
            self.optimizer = AdamW(
                config.lr,
                betas=[config.beta1, config.beta2],
                weight_decay=config.weight_decay,
                bias_correction=True,
            )
            self.optimizer.init(self.values)
        self.gradients: dict[str, mx.array] = {}

    def begin(self) -> None:
        """See ``Learner.begin``."""
        self.gradients = {}

    def learn(self, batch: Batch, loss: Any) -> tuple[float, dict[str, float]]:
        """See ``Learner.learn``. ``loss`` gives an array, and what its routers did."""
        mine = self.values

        def at(values: dict[str, mx.array]) -> Any:
            self.values = values
            return loss(batch)

        with mx.stream(self.backend.device):
            try:
                (value, seen), new = mx.value_and_grad(at)(mine)
            finally:
                self.values = mine
            old = self.gradients or {name: mx.zeros_like(x) for name, x in new.items()}
            self.gradients = {name: old[name] + x for name, x in new.items()}
            mx.eval(value, seen, self.gradients)
        routing = Routing()
        for name, x in seen.items():
            routing(name, tensor(x))
        found = {"cross_entropy": number(value), "tokens": float(len(batch.tokens))}
        found |= {name: x * batch.share for name, x in routing.statistics().items()}
        return number(value), found

    def clip(self, longest: float) -> float:
        """See ``Learner.clip``."""
        with mx.stream(self.backend.device):
            squares = [mx.square(x).sum() for x in self.gradients.values()]
            norm = mx.sqrt(mx.stack(squares).sum())
            share = mx.minimum(1.0, longest / (norm + 1e-6))
            self.gradients = {name: share * x for name, x in self.gradients.items()}
            return number(norm)

    def update(self, share: float) -> None:
        """See ``Learner.update``."""
        with mx.stream(self.backend.device):
            self.optimizer.learning_rate = share * self.config.lr
            self.values = self.optimizer.apply_gradients(self.gradients, self.values)
            mx.eval(self.values, self.optimizer.state)

    def trained(self) -> dict[str, Tensor]:
        """See ``Learner.trained``."""
        return {name: tensor(x) for name, x in self.values.items()}

    def optimized(self) -> list[Any]:
        """See ``Learner.optimized``."""
        state = self.optimizer.state
        moments = {n: {k: tensor(x) for k, x in state[n].items()} for n in self.values}
        return [{"step": self.optimizer.step.item(), "moments": moments}]

    def restore(self, trained: dict[str, Tensor], optimized: list[Any]) -> None:
        """See ``Learner.restore``."""
        [state] = optimized
        with mx.stream(self.backend.device):
            self.values = {name: mx.array(x.numpy()) for name, x in trained.items()}
            self.optimizer.state["step"] = mx.array(state["step"], mx.uint64)
            for name, moments in state["moments"].items():
                self.optimizer.state[name] = {k: mx.array(x.numpy()) for k, x in moments.items()}


def cross_entropy(learner: Adapters, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
    """A batch's share of the step's loss, and what its routers did."""
    backend, seen = learner.backend, dict[str, mx.array]()

    def see(name: str, x: mx.array) -> None:
        if name.endswith(".mlp.gate"):
            seen[name] = mx.stop_gradient(x)
        elif name.endswith(".mlp.chosen"):
            seen[name] = x.astype(mx.int32)

    scored = logprobs(
        adapted(backend.weights, learner.values, learner.scale),
        backend.config,
        *(batch.tokens.numpy(), batch.lengths, batch.wanted.numpy(), batch.targets.numpy()),
        trace=see,
        layer=recomputed if learner.config.recompute else None,
    )
    return -(scored * mx.array(batch.weights.numpy())).sum(), seen


def number(x: mx.array) -> float:
    """Of an array that holds one."""
    return float(np.array(x))


def tensor(x: mx.array) -> Tensor:
    """The same numbers in torch; what is bfloat16 in float32."""
    return torch.from_numpy(np.array(readable(x)))
