"""A run -> a checkpoint that every engine loads, and what packing changed.

Adapters are merged, experts packed by the rule the run was trained for, all else rounded to
bfloat16; what a run did not change keeps its bytes. The report says how far each expert is from
what was trained, and what that does to the loss.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from gptoss.backends.torch.modules import Transformer
from gptoss.backends.torch.ops import PackedTensor
from gptoss.checkpoint.open import Checkpoint, open_checkpoint
from gptoss.checkpoint.save import Progress, save
from gptoss.model.mxfp4 import Packed, Rule
from gptoss.model.weights import Read, Stored
from gptoss.train.config import Reading, TrainConfig
from gptoss.train.corpus import Corpus
from gptoss.train.lora import LowRank, LowRankStack
from gptoss.train.loss import score
from gptoss.train.quantize import QuantizedStack
from gptoss.train.recipes import corpus_of, load_run, tokenizer_of, tokenizer_path

LINES = 64  # of held-out data, for the loss before and after


@dataclass(frozen=True, slots=True)
class Report:
    """What export changed."""

    experts: list[dict[str, Any]]  # block, matrix, expert, relative (rms error / rms), largest
    loss: float | None  # as trained, on the data given
    loss_after: float | None  # of what was written

    def __str__(self) -> str:
        worst = max(self.experts, key=lambda row: row["relative"], default=None)
        said = "experts are as trained, to the bit"
        if worst is not None and worst["relative"] > 0:
            mean = sum(row["relative"] for row in self.experts) / len(self.experts)
            said = (
                f"experts are {mean:.2%} from what was trained (root mean square); the farthest, "
                f"expert {worst['expert']} of {worst['matrix']}, {worst['relative']:.2%}"
            )
        if self.loss is None or self.loss_after is None:
            return said
        change = self.loss_after - self.loss
        return f"{said}; loss {self.loss:.4f} as trained, {self.loss_after:.4f} ({change:+.4f}) now"


def export(
    run: Path | str,
    target: Path | str,
    layout: str = "huggingface",
    *,
    rule: Rule | None = None,
    data: Sequence[Path | str] = (),
    progress: Progress | None = None,
) -> Report:
    """Write the newest checkpoint of ``run`` to ``target`` in a layout of ``checkpoint/``.

    ``rule`` packs experts; by default the one of quantisation-aware training, or least squares.
    With ``data`` the loss of at most 64 of its lines is measured before and after. The report is
    also written into the run's directory, as ``export-NAME.json``.

    Raises:
        TrainingError: there is no run, or a line of ``data`` is bad; nothing is written then.
        CheckpointError: as ``gptoss.checkpoint.save.save``.
    """
    model, asked = load_run(run)
    used: Rule = rule or asked.get("qat") or "least_squares"
    assert used in get_args(Rule)
    read = reader(model)
    reading = Reading(**{k: asked[k] for k in asdict(Reading()) if k in asked})
    length = model.config.context_length
    corpus = corpus_of(data, tokenizer_of(asked), reading, length) if data else None
    before = None if corpus is None else evaluate(model, corpus, reading.tokens)
    written = save(
        model.config,
        read,
        target,
        layout,
        tokenizer_path=tokenizer_path(asked),
        rule=used,
        progress=progress,
    )
    after = None
    if corpus is not None:
        exported = Transformer.from_checkpoint(written, dtype="float32")
        after = evaluate(exported, corpus, reading.tokens)
    report = Report(_errors(model, read, open_checkpoint(written)), before, after)
    path = Path(run) / f"export-{Path(target).name}.json"
    path.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def reader(model: Transformer) -> Read:
    """The canonical tensors of a model in training: adapters merged, packed experts as they are."""
    parts: dict[str, Any] = model.state_dict()
    blocks: Any = model.block
    for i, block in enumerate(blocks):
        for name in ("qkv", "out"):
            if isinstance(linear := getattr(block.attn, name), LowRank):
                parts[f"block.{i}.attn.{name}.weight"] = linear
                parts[f"block.{i}.attn.{name}.bias"] = linear.base.bias
        for name in ("mlp1_weight", "mlp2_weight"):
            parts[f"block.{i}.mlp.{name}"] = getattr(block.mlp.experts, name)
    return lambda name: _stored(parts[name])


@torch.no_grad()
def _stored(part: Any) -> Stored:
    match part:
        case LowRank():
            return _stored(part.merged())
        case LowRankStack(base=PackedTensor() as base) if not part.b.any():
            return _stored(base)
        case LowRankStack():
            return torch.stack([part.merged(e) for e in range(len(part.a))]).cpu().numpy()
        case QuantizedStack():
            return _stored(part.weight)
        case PackedTensor():
            return Packed(part.blocks.cpu().numpy(), part.scales.cpu().numpy())
    found: Stored = part.detach().float().cpu().numpy()
    return found


def _errors(model: Transformer, read: Read, written: Checkpoint) -> list[dict[str, Any]]:
    """By matrix and expert: how far what was written is from what was trained."""
    rows = []
    for i in range(model.config.num_hidden_layers):
        for name in ("mlp1_weight", "mlp2_weight"):
            matrix = f"block.{i}.mlp.{name}"
            ours, theirs = read(matrix), written.read(matrix)
            for e in range(model.config.num_experts):
                one, other = _numbers(ours[e]), _numbers(theirs[e])
                error, size = np.abs(other - one), np.sqrt(np.mean(one * one))
                relative = float(np.sqrt(np.mean(error * error)) / size) if size else 0.0
                largest = float(error.max())
                rows.append(
                    {"matrix": matrix, "expert": e, "relative": relative, "largest": largest}
                )
    return rows


def _numbers(stored: Any) -> Any:
    return stored.decode() if isinstance(stored, Packed) else np.asarray(stored, np.float32)


@torch.no_grad()
def evaluate(model: Transformer, corpus: Corpus, tokens: int, lines: int = LINES) -> float:
    """Mean surprise of a learned token, over the first lines of a corpus."""
    total, learned, used = 0.0, 0, 0
    position: list[int] | None = None
    config = TrainConfig()
    while used < min(lines, len(corpus)):
        batches, position = corpus.draw(position, tokens=tokens, batches=1)
        for batch in batches:
            found: Tensor = score(model, batch, config)
            total, learned = total - float(found.double().sum()), learned + len(found)
        used = position[0]
    return total / learned
