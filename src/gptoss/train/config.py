"""How a run goes: numbers that cannot exist wrong. What a field's help says is its meaning.

Nothing here needs torch, so that the command line can be read without it.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from gptoss.model.mxfp4 import Rule
from gptoss.text.messages import CHANNELS, Role

Schedule = Literal["constant", "linear", "cosine", "wsd"]
NEW = {"save_every", "keep", "milestone", "threads", "tensorboard"}  # a run may go on with others
NEW |= {"offload", "offload_dir", "force", "tensor", "expert"}


def said(default: Any, text: str, least: float | None = None, most: float | None = None) -> Any:
    """A field with its help and its bounds; a number is at least zero."""
    if least is None and isinstance(default, int | float) and not isinstance(default, bool):
        least = 0
    return field(default=default, metadata={"help": text, "min": least, "max": most})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every recipe shares. ValueError names a field that is out of its bounds."""

    steps: int = said(1000, "updates of the parameters", 1)
    lr: float = said(1e-4, "peak learning rate of AdamW")
    muon: float | None = said(None, "train the matrices by Muon, with this peak learning rate", 0)
    weight_decay: float = said(0.0, "of AdamW, on matrices only")
    beta1: float = said(0.9, "of AdamW", 0.0, 0.9999)
    beta2: float = said(0.95, "of AdamW", 0.0, 0.999999)
    warmup: int = said(20, "steps in which the rate rises")
    schedule: Schedule = said("cosine", "how it falls; wsd: level first, then straight down")
    decay: float = said(0.2, "wsd: share of the steps in which it falls", 0.0, 1.0)
    floor: float = said(0.0, "where the rate ends, as a share of its peak", 0.0, 1.0)
    clip: float = said(1.0, "longest gradient")
    balance: float = said(0.0, "weight of the router's load-balancing loss")
    autocast: bool = said(False, "compute in bfloat16; parameters keep their own dtype")
    recompute: bool = said(False, "keep no activations inside layers: less memory, more time")
    offload: Literal["optimizer", "parameters"] | None = said(
        None,
        "put away, in a GPU's host memory or in files, the optimiser's state; or that, gradients "
        "and the layers not at work, which are then recomputed",
    )
    offload_dir: str | None = said(None, "put away in files here, not in memory or the run's own")
    tensor: int = said(1, "processes that compute each batch together: some heads, some experts", 1)
    expert: int = said(1, "processes that divide the experts and send each other tokens", 1)
    seed: int = said(0, "of new parameters and of the order of the data")
    save_every: int = said(200, "steps between checkpoints", 1)
    keep: int = said(2, "newest checkpoints to keep", 1)
    milestone: int | None = said(None, "keep every checkpoint at a multiple of so many steps", 1)
    threads: int | None = said(None, "that compute; as many as there are cores", 1)
    device: str = said("cpu", "cpu or cuda; of mlx, cpu or gpu")
    tensorboard: bool = said(False, "write for TensorBoard too")
    force: bool = said(False, "begin even if memory is too little")

    def __post_init__(self) -> None:
        check(self)


def check(config: Any) -> None:
    """Refuse a field that is out of its bounds."""
    for one in fields(config):
        value = getattr(config, one.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least, most = one.metadata["min"], one.metadata["max"]
        if not least <= value <= (math.inf if most is None else most) or math.isinf(value):
            upper = "" if most is None else f" and at most {most:g}"
            raise ValueError(f"{one.name} must be at least {least:g}{upper}, not {value}")


def rate(step: int, c: TrainConfig) -> float:
    """The learning rate of a step, as a share of its peak."""
    warm = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
    done = max(0, step - c.warmup) / max(1, c.steps - c.warmup)  # of what comes after warming up
    match c.schedule:
        case "constant":
            level = 1.0
        case "linear":
            level = 1.0 - done
        case "cosine":
            level = 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":  # warm up, stay, decay: Hu et al. 2024, https://arxiv.org/abs/2404.06395
            level = min(1.0, (1.0 - done) / c.decay) if c.decay else 1.0
        case other:
            raise ValueError(f"schedule must be constant, linear, cosine or wsd, not {other!r}")
    return warm * (c.floor + (1.0 - c.floor) * level)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a supervised recipe learns from."""

    tokens: int = said(4096, "most tokens of a batch, and of a conversation", 2)
    accumulate: int = said(1, "batches of a step", 1)
    train_on: str = said("assistant", "whose messages are learned: roles, role/channel, by commas")

    def __post_init__(self) -> None:
        check(self)
        self.selection()

    def selection(self) -> list[str]:
        """``train_on`` as a list. Raises ValueError for what is no role."""
        chosen = [part.strip() for part in self.train_on.split(",")]
        for part in chosen:
            role, _, channel = part.partition("/")
            if role not in get_args(Role) or (channel and channel not in CHANNELS):
                raise ValueError(
                    f"train_on: {part!r} is no role ({', '.join(get_args(Role))}), alone or with "
                    f"/channel ({', '.join(CHANNELS)})"
                )
        return chosen


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What of a checkpoint is trained. Everything, unless something is said."""

    lora: int = said(0, "rank of adapters on attention and experts, which then stay packed")
    alpha: float = said(16.0, "strength of the adapters: their product counts alpha / rank")
    qat: Rule | None = said(None, "compute as if packed to MXFP4 by this rule for scales")
    dtype: Literal["float32", "bfloat16"] = said("float32", "of the parameters")

    def __post_init__(self) -> None:
        check(self)
        if self.lora and self.qat:
            raise ValueError("lora and qat exclude each other: adapted experts stay packed")
