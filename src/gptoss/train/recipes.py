"""The supervised recipes: from nothing, and from a checkpoint, on files of JSON lines.

    sft("nano", ["chats.jsonl"], "runs/first", config=TrainConfig(steps=300, lr=1e-3))
    sft("openai/gpt-oss-20b", ["chats.jsonl"], "runs/lora", tuning=Tuning(lora=8))
    pretrain("nano", ["texts.jsonl"], "runs/new", tokenizer="words.json")

Each goes on where an earlier call with the same arguments was interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from gptoss.backends.torch.backend import open_device
from gptoss.backends.torch.modules import Transformer
from gptoss.checkpoint.files import read_json
from gptoss.checkpoint.open import Checkpoint, open_checkpoint
from gptoss.errors import TrainingError
from gptoss.llm.models import resolve
from gptoss.model.config import PRESETS, ModelConfig
from gptoss.text.tokenizer import Tokenizer
from gptoss.train.batch import Batch, Document
from gptoss.train.config import Reading, TrainConfig, Tuning
from gptoss.train.conversation import documents
from gptoss.train.corpus import Corpus
from gptoss.train.folder import newest, read_document, read_state, restore
from gptoss.train.lint import lint
from gptoss.train.lora import adapt
from gptoss.train.loss import cross_entropy
from gptoss.train.observe import Observe, observed
from gptoss.train.offload import keeper, learner_of, shelf_of
from gptoss.train.plan import Plan, make_plan
from gptoss.train.quantize import quantize
from gptoss.train.ranks import join
from gptoss.train.shelf import Shelf
from gptoss.train.trainer import Row, Trainer

Paths = Sequence[Path | str]
Watch = Callable[[Row], None]
Looked = Callable[[int, int], None]
Announce = Callable[[Plan], None]


def sft(
    model: Path | str,
    data: Paths,
    path: Path | str,
    *,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    reading: Reading = Reading(),  # noqa: B008
    tuning: Tuning = Tuning(),  # noqa: B008
    watch: Watch | None = None,
    looked: Looked | None = None,
    observe: Observe | None = None,
    announce: Announce | None = None,
) -> Trainer[Any]:
    """Train a checkpoint on conversations: all of it, adapters only, or for MXFP4.

    Args:
        model: "nano", a checkpoint's path, or a Hugging Face id.
        data: files of JSON lines; see ``conversation.py``.
        path: the run's directory.
        config, reading, tuning: how to train, what to learn from, and what is trained.
        watch: is told each step's metrics.
        looked: is told how many lines of how many have been checked before training.
        observe: may see what a batch computes; see ``observe.py``.
        announce: is told what memory it will take, before the model is loaded.

    Raises:
        TrainingError: a line is no conversation, the loss is no number, the directory is taken,
            memory is too little and ``config.force`` is not set.
        Stopped: SIGINT or SIGTERM came; the last finished step is kept.
        CheckpointError: the model cannot be read, or a checkpoint cannot be written.
    """
    asked = {"recipe": "sft", "model": str(model), "tokenizer": None, **asdict(tuning)}
    return _supervised(asked, data, path, config, reading, watch, looked, observe, announce)


def pretrain(
    model: Path | str,
    data: Paths,
    path: Path | str,
    *,
    tokenizer: Path | str | None = None,
    config: TrainConfig = TrainConfig(),  # noqa: B008
    reading: Reading = Reading(),  # noqa: B008
    watch: Watch | None = None,
    looked: Looked | None = None,
    observe: Observe | None = None,
    announce: Announce | None = None,
) -> Trainer[Any]:
    """Train a new model. As ``sft``, but ``model`` is a preset's name or the path of a config.json.

    ``tokenizer`` is the path of a tokenizer.json; without one it is gpt-oss's own vocabulary.
    """
    words = None if tokenizer is None else str(tokenizer)
    asked = {"recipe": "pretrain", "model": str(model), "tokenizer": words, **asdict(Tuning())}
    return _supervised(asked, data, path, config, reading, watch, looked, observe, announce)


def _supervised(
    asked: dict[str, Any],
    data: Paths,
    path: Path | str,
    config: TrainConfig,
    reading: Reading,
    watch: Watch | None,
    looked: Looked | None,
    observe: Observe | None,
    announce: Announce | None,
) -> Trainer[Any]:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = join(config)
    if observe is not None and not ranks.alone:
        raise ValueError("trace: only one process alone can be traced")
    plan = planned(asked, path, config, reading.tokens) if ranks.alone else None
    corpus = gathered(asked, data, path, reading, config.seed, looked)
    if announce is not None and plan is not None:
        announce(plan)
    torch.manual_seed(config.seed)
    shelf = shelf_of(config, path) if config.offload == "parameters" else None
    whole = config.device if ranks.alone else "cpu"  # a device of several gets its part alone
    module = build(asked, whole, shelf)
    learner = learner_of(module, config, path, shelf, ranks)
    trainer: Trainer[Any] = Trainer(
        learner, config, path, asked=asked | asdict(reading), watch=watch, ranks=ranks
    )

    def loss(batch: Batch) -> Any:
        return cross_entropy(module, batch, config, learner.layer)

    trainer.run(
        lambda position: corpus.draw(position, tokens=reading.tokens, batches=reading.accumulate),
        observed(trainer, module, loss, observe),
    )
    return trainer


def gathered(
    asked: dict[str, Any],
    data: Paths,
    path: Path | str,
    reading: Reading,
    seed: int,
    looked: Looked | None,
) -> Corpus:
    """A run's data, of which ``asked`` says the rest; read through before its first step.

    Raises TrainingError as ``sft``.
    """
    words, numbers = tokenizer_of(asked), numbers_of(asked)
    if words.vocab_size > numbers.vocab_size:
        raise TrainingError(
            f"{asked['model']} has {numbers.vocab_size} words, but the tokenizer "
            f"{words.vocab_size}; give the model's own tokenizer.json"
        )
    corpus = corpus_of(data, words, reading, numbers.context_length, seed)
    if not (Path(path) / "states").exists():
        lint(corpus, looked)
    asked |= {"data": [str(file) for file in data], "checksums": corpus.checksums}
    return corpus


def corpus_of(
    data: Paths, tokenizer: Tokenizer, reading: Reading, context: int, seed: int = 0
) -> Corpus:
    """The files, read as ``reading`` says."""
    longest = min(reading.tokens, context)
    train_on = reading.selection()

    def render(raw: Any, origin: str) -> list[Document]:
        return documents(raw, tokenizer, train_on=train_on, longest=longest, origin=origin)

    return Corpus(data, render, seed)


def tokenizer_of(asked: dict[str, Any]) -> Tokenizer:
    """The run's vocabulary: its own file's, or its model's, or gpt-oss's."""
    path = tokenizer_path(asked)
    return Tokenizer.o200k_harmony() if path is None else Tokenizer.from_file(path)


def tokenizer_path(asked: dict[str, Any]) -> Path | None:
    """The tokenizer.json of a run, where it has one."""
    if asked["tokenizer"] is not None:
        return Path(asked["tokenizer"])
    return None if asked["recipe"] == "pretrain" else checkpoint_of(asked).tokenizer_path


def numbers_of(asked: dict[str, Any]) -> ModelConfig:
    """The run's model config. Raises TrainingError if there is none by its name."""
    if asked["recipe"] != "pretrain":
        return checkpoint_of(asked).config
    name = asked["model"]
    if name in PRESETS:
        preset: ModelConfig = PRESETS[name]()
        return preset
    if not Path(name).is_file():
        raise TrainingError(
            f"{name}: a new model is {', '.join(PRESETS)}, or the path of a config.json"
        )
    return ModelConfig.from_json(read_json(Path(name)), origin=name)


def checkpoint_of(asked: dict[str, Any]) -> Checkpoint:
    """What a run that is no new model begins with."""
    where = resolve(asked["model"])
    if (where / "states").is_dir():
        raise TrainingError(f"{where}: this is a run; export it first: gptoss train export {where}")
    return open_checkpoint(where)


def planned(
    asked: dict[str, Any], path: Path | str, config: TrainConfig, tokens: int, **rest: Any
) -> Plan:
    """What a run will take; ``tokens`` and ``rest``: see ``make_plan``.

    Raises TrainingError where there is too little of it, unless ``config.force``.
    """
    packed = asked["recipe"] != "pretrain" and checkpoint_of(asked).layout.packed
    how = (path, config, tuning_of(asked), tokens)
    plan = make_plan(asked["model"], numbers_of(asked), *how, packed=packed, **rest)
    if not config.force:
        plan.check()
    return plan


def tuning_of(asked: dict[str, Any]) -> Tuning:
    """What of the model a run trains."""
    return Tuning(**{one.name: asked[one.name] for one in fields(Tuning)})


def build(asked: dict[str, Any], device: str, shelf: Shelf | None = None) -> Transformer:
    """The model that a run begins with, and in it what is trained; on a shelf, its layers."""
    open_device(device)
    if asked["recipe"] == "pretrain":
        return Transformer(numbers_of(asked)).to(device if shelf is None else "cpu")
    tuning, where = tuning_of(asked), checkpoint_of(asked).path
    module = Transformer.from_checkpoint(
        where,
        device if shelf is None else "cpu",
        tuning.dtype,
        packed=tuning.lora > 0,
        keep=None if shelf is None else keeper(shelf, device),
    )
    if tuning.lora:
        adapt(module, tuning.lora, tuning.alpha)
    elif tuning.qat:
        quantize(module, tuning.qat)
    return module


def load_run(path: Path | str, device: str = "cpu") -> tuple[Transformer, dict[str, Any]]:
    """The model of a run as its newest checkpoint has it, and what the run was begun with."""
    latest = newest(path)
    if latest is None:
        raise TrainingError(f"{path}: there is no run with a checkpoint here")
    asked = read_document(Path(path) / "config.json")
    needed = ("recipe", "model", "tokenizer", *(one.name for one in fields(Tuning)))
    if missing := [name for name in needed if name not in asked]:
        raise TrainingError(
            f"{path}/config.json: does not say {', '.join(missing)}, without which its model "
            "cannot be built; put back the config.json that the run was begun with"
        )
    model = build(asked, device)
    restore(model, read_state(latest)["model"])
    return model, asked
