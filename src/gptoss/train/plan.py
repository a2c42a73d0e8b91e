"""What a run will take of memory: worked out from shapes, and said before a weight is read.

What backward needs was counted on small models (``tests/train/test_plan.py`` counts again); what an
allocator wastes was not.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gptoss.backends.torch.memory import free_memory
from gptoss.errors import TrainingError
from gptoss.llm.memory import available_memory
from gptoss.llm.needs import BYTES, PACKED, counts, estimate
from gptoss.llm.plan import size
from gptoss.model.config import ModelConfig
from gptoss.model.weights import specs
from gptoss.train.config import TrainConfig, Tuning
from gptoss.train.loss import CHUNK
from gptoss.train.objective import Rollouts

NARROW = 0.62  # of float32's activations, what bfloat16 keeps: norms and scores stay wide
PROMPT = 512  # tokens of a prompt, as long as nobody has counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes of memory, estimated."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # of the largest batch, its loss included
    rollouts: int  # answers' keys and values, and the model that answers are held to

    @property
    def total(self) -> int:
        """All together."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run takes, and what there is."""

    name: str  # the model's
    device: str
    needs: Needs  # where it computes
    available: int | None  # there; None: unknown
    away: int  # bytes that are put away
    shelf: str  # where to
    room: int | None  # bytes that are free there
    state: int  # bytes of a checkpoint
    disk: int  # bytes that are free for it
    savings: tuple[str, ...]  # what would make it less, the cheapest first

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {size(n)}" for name, n in asdict(self.needs).items() if n)
        have = "" if self.available is None else f"; {size(self.available)} free"
        away = f"; {size(self.away)} put away in {self.shelf}" if self.away else ""
        memory = f"memory {size(self.needs.total)} = {parts}{have}{away}"
        return f"{self.name} on {self.device}: {memory}; {size(self.state)} a checkpoint"

    def check(self) -> None:
        """Raises TrainingError where it cannot fit."""
        needed = f"{self.name} needs about"
        if self.available is not None and self.needs.total > self.available:
            raise TrainingError(
                f"{needed} {size(self.needs.total)} of memory to be trained like this, but "
                f"{size(self.available)} are free. Try {', '.join(self.savings)}, "
                "or --force to begin anyway."
            )
        if self.room is not None and self.away > self.room:
            raise TrainingError(
                f"{needed} {size(self.away)} in {self.shelf} beside memory, but {size(self.room)} "
                "are free there. Make room, name another --offload-dir, or --force to begin anyway."
            )
        if self.state > self.disk:
            raise TrainingError(
                f"{needed} {size(self.state)} of disk for a checkpoint, but {size(self.disk)} are "
                "free. Make room, choose another disk, or --force to begin anyway."
            )


def make_plan(
    name: str,
    numbers: ModelConfig,
    path: Path | str,
    config: TrainConfig,
    tuning: Tuning,
    tokens: int,
    *,
    packed: bool = True,
    rollouts: Rollouts | None = None,
    reference: bool = False,
) -> Plan:
    """What a run in the directory ``path`` takes.

    Args:
        name, numbers: the model, and how large it is.
        tokens: most of a batch.
        packed: whether the checkpoint's experts are.
        rollouts, reference: of recipes on rewards: how answers are drawn, and whether the model
            that training began with is kept.
    """
    takes = _takes(numbers, config, tuning, packed)
    activations = _activations(numbers, config, tuning, tokens) + takes["working"]
    answers = float(_rollouts(numbers, rollouts, tuning.dtype)) if rollouts else 0.0
    answers += takes["whole"] if reference else 0.0
    kinds = ("parameters", "gradients", "optimizer")
    needs = Needs(
        **{kind: round(takes[kind]) for kind in kinds},
        activations=round(activations),
        rollouts=round(answers),
    )
    host = config.offload_dir is None and config.device.startswith("cuda")
    shelf = Path(config.offload_dir or path)
    return Plan(
        name=name,
        device=config.device,
        needs=needs,
        available=available_memory() if config.device == "cpu" else free_memory(config.device),
        away=round(takes["away"]),
        shelf="host memory" if host else str(shelf),
        room=available_memory() if host else _free(shelf),
        state=round(takes["state"]),
        disk=_free(Path(path)),
        savings=tuple(_savings(needs, config, tuning)),
    )


def _takes(c: ModelConfig, config: TrainConfig, tuning: Tuning, packed: bool) -> dict[str, float]:
    """By kind: what is in memory, ``working`` for a moment; the ``whole`` model, what is put
    ``away``, and a checkpoint's ``state``."""
    width, outside = BYTES[tuning.dtype], 2 * c.vocab_size * c.hidden_size + c.hidden_size
    dense, experts = counts(c)
    layers = width * (dense - outside) + experts * (PACKED if tuning.lora and packed else width)
    inside, trained, wide = dense - outside + experts, dense + experts, width
    largest = max(math.prod(spec.shape) for spec in specs(c))
    if tuning.lora:
        inside, wide = sum(_adapters(c, tuning.lora)), BYTES["float32"]
        trained, largest, layers = inside, max(_adapters(c, tuning.lora)), layers + wide * inside
    moments = wide * (2 * trained - (inside if config.muon is not None else 0))
    found = {"parameters": width * outside + layers, "gradients": float(wide * trained)}
    found |= {"optimizer": moments, "away": 0.0, "state": wide * trained + moments}
    found |= {"whole": found["parameters"], "working": wide * largest}
    if config.offload is not None:
        found |= {"away": moments, "optimizer": 2 * wide * largest}
    if config.offload == "parameters":
        found["away"] += found["gradients"] + layers
        found["parameters"] += layers / c.num_hidden_layers - layers
        found["gradients"] = wide * max(inside / c.num_hidden_layers, largest)
    return found


def _activations(c: ModelConfig, config: TrainConfig, tuning: Tuning, tokens: int) -> float:
    """What backward needs of a batch, and the logits that are there together."""
    D, F, H, K = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads
    each = 6 * D + c.experts_per_token * (7 * F + 2 * D) + c.head_dim * (3.3 * H + 3 * K + 3)
    narrow = config.autocast or tuning.dtype == "bfloat16"
    whole = config.recompute or config.offload == "parameters"  # layers are computed again
    layers = 1 if whole else c.num_hidden_layers
    kept = each * layers + D * (c.num_hidden_layers if whole else 1)
    copies = 0.0  # autocast's, of weights
    if config.autocast and tuning.dtype == "float32" and not tuning.lora:
        copies = 2 * sum(counts(c)) * layers / c.num_hidden_layers
    logits = 3 * min(CHUNK, tokens * c.vocab_size)
    return 4 * (tokens * kept * (NARROW if narrow else 1.0) + logits) + copies


def _adapters(c: ModelConfig, rank: int) -> list[int]:
    """Parameters of each stack of adapters: see ``lora.adapt``."""
    D, F, E = c.hidden_size, c.intermediate_size, c.num_experts
    heads = c.head_dim * c.num_attention_heads
    sides = [D, c.qkv_size, heads, D, E * D, E * 2 * F, E * F, E * D]
    return [rank * side for side in sides] * c.num_hidden_layers


def _rollouts(c: ModelConfig, rollouts: Rollouts, dtype: str) -> int:
    rows = min(rollouts.rows, rollouts.prompts * rollouts.group)
    room = min(rollouts.max_tokens + PROMPT, c.context_length)
    cache = estimate(c, "torch", dtype, room, conversations=rows).cache
    return cache + 3 * BYTES["float32"] * rows * c.vocab_size


def _savings(needs: Needs, config: TrainConfig, tuning: Tuning) -> Iterator[str]:
    """Options that would help."""
    if needs.activations > needs.total / 4:
        if not config.recompute and config.offload != "parameters":
            yield "--recompute"
        yield "fewer --tokens"
    if needs.rollouts > needs.total / 4:
        yield "fewer --rows"
    if not tuning.lora:
        yield "--lora 8"
    if config.offload is None:
        yield "--offload optimizer"
    elif config.offload == "optimizer":
        yield "--offload parameters"
    if tuning.dtype == "float32":
        yield "--dtype bfloat16"


def _free(path: Path) -> int:
    """Bytes of disk for a directory that need not be there yet."""
    whole = path.absolute()
    return shutil.disk_usage(next(p for p in (whole, *whole.parents) if p.exists())).free
