"""Canonical weights -> the files of any layout, without ever holding a model in memory.

All sizes follow from the config, so a file's header is written first and its tensors after it, a
piece at a time. What was written is opened once before it takes its name.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gptoss.checkpoint import safetensors
from gptoss.checkpoint.files import read_json
from gptoss.checkpoint.layout import Entry, Layout
from gptoss.checkpoint.mlx import MLX, QUANTIZATION
from gptoss.checkpoint.open import LAYOUTS, open_checkpoint
from gptoss.checkpoint.pieces import THREADS, Source
from gptoss.checkpoint.staged import staged, sync
from gptoss.errors import CheckpointError
from gptoss.model.config import Dialect, ModelConfig
from gptoss.model.mxfp4 import BLOCK, RULES, Rule
from gptoss.model.weights import Read, specs

Progress = Callable[[int, int], None]  # bytes of tensors written, bytes in all
SHARD = 5_000_000_000  # bytes of a Hugging Face shard
BESIDE = (  # what else Hugging Face's loaders look for next to tokenizer.json
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
LAST_SPECIAL = 200012
GENERATION = {  # as released: <|startoftext|>; <|return|>, <|endoftext|>, <|call|>
    "bos_token_id": 199998,
    "do_sample": True,
    "eos_token_id": [200002, 199999, 200012],
    "pad_token_id": 199999,
}


def convert(
    source: Path | str,
    target: Path | str,
    layout: str,
    *,
    tokenizer_path: Path | str | None = None,
    rule: Rule = "least_squares",
    shard_bytes: int | None = SHARD,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint at ``source`` to ``target`` in another layout. Arguments as ``save``;
    the tokenizer is the one beside the weights unless another is given.
    """
    checkpoint = open_checkpoint(source)
    if Path(target).resolve() == checkpoint.files[0].parent.resolve():
        raise CheckpointError(f"{target}: a checkpoint cannot be converted onto itself")
    return save(
        checkpoint.config,
        checkpoint.read,
        target,
        layout,
        tokenizer_path=tokenizer_path or checkpoint.tokenizer_path,
        rule=rule,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def save(
    config: ModelConfig,
    read: Read,
    path: Path | str,
    layout: str,
    *,
    tokenizer_path: Path | str | None = None,
    rule: Rule = "least_squares",
    shard_bytes: int | None = SHARD,
    progress: Progress | None = None,
) -> Path:
    """Write every tensor of a model, as ``read(canonical name)`` gives it, to the directory
    ``path``, and return it.

    ``layout`` is one of ``LAYOUTS``; ``rule`` says how dense experts are packed. Hugging Face's
    layouts are split into shards of about ``shard_bytes`` (None: one file), the original never is.
    ``tokenizer_path`` is a tokenizer.json to copy.

    Raises:
        ValueError: an unknown layout or rule, shards of no bytes, or a tensor that has another
            shape than the config says.
        CheckpointError: something is at ``path`` already, the disk is too small, fills up or fails,
            or values cannot be packed or do not fit into bfloat16. Nothing is left behind.
    """
    form = _layout(layout)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, or None, not {shard_bytes}")
    target = Path(path).resolve()
    _check_columns(config, form)
    if tokenizer_path is not None and not Path(tokenizer_path).is_file():
        raise CheckpointError(f"{tokenizer_path}: there is no such tokenizer.json")
    plan = _plan(config, form, shard_bytes)
    total = sum(map(_nbytes, form.entries(config)))
    with staged(target, total) as partial, ThreadPoolExecutor(THREADS) as pool:
        shapes = {spec.name: spec.shape for spec in specs(config)}
        source = Source(read, shapes, rule, pool)
        report = _reporter(progress, total)
        for name, entries in plan.items():
            _write_tensors(partial / name, entries, source, report, _metadata(form))
        if len(plan) > 1:
            _write_json(partial / "model.safetensors.index.json", _index(plan, total))
        _write_beside(partial, config, form, tokenizer_path)
        _write_json(partial / "config.json", _config(config, form))
        _verify(partial, config, form, plan)
    return target


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {name!r}")
    return LAYOUTS[name]


def _config(config: ModelConfig, form: Layout) -> dict[str, Any]:
    dialect: Dialect = "original" if form.name == "original" else "huggingface"
    found = config.to_json(dialect, packed=form.packed)
    if form is MLX:
        found |= {"quantization": QUANTIZATION, "quantization_config": QUANTIZATION}
    return found


def _metadata(form: Layout) -> dict[str, str]:
    """Transformers insists on a format."""
    return {} if form.name == "original" else {"format": "mlx" if form is MLX else "pt"}


def _check_columns(config: ModelConfig, form: Layout) -> None:
    for name in ("hidden_size", "intermediate_size"):
        if form.packed and getattr(config, name) % BLOCK:
            raise CheckpointError(
                f"{name} is {getattr(config, name)}, but the {form.name} layout packs experts in "
                f"blocks of {BLOCK} columns; choose huggingface-bf16"
            )


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * {"U8": 1, "U32": 4}.get(entry.dtype, 2)


def _plan(config: ModelConfig, form: Layout, shard_bytes: int | None) -> dict[str, list[Entry]]:
    """File name -> its tensors. What one canonical tensor gives stays together, in table order."""
    limit = math.inf if form.name == "original" or shard_bytes is None else shard_bytes
    shards: list[list[Entry]] = [[]]
    filled = 0
    for _, same in groupby(form.entries(config), lambda entry: entry.canonical):
        group = list(same)
        size = sum(map(_nbytes, group))
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    return dict(zip(names, shards, strict=True))


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    """Length and JSON, padded so that the tensors begin at a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + _nbytes(entry)
        shape = list(entry.shape)
        table[entry.name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(plan: dict[str, list[Entry]], total: int) -> dict[str, Any]:
    where = {entry.name: file for file, entries in plan.items() for entry in entries}
    return {"metadata": {"total_size": total}, "weight_map": where}


def _write_tensors(
    path: Path,
    entries: list[Entry],
    source: Source,
    report: Callable[[int], None],
    metadata: dict[str, str],
) -> None:
    header = _header(entries, metadata)
    with path.open("wb") as file:
        file.write(header)
        for canonical, same in groupby(entries, lambda entry: entry.canonical):
            for piece in source.pieces(canonical, list(same)):
                file.write(np.ascontiguousarray(piece).view(np.uint8).data)
                report(piece.nbytes)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    assert size == len(header) + sum(map(_nbytes, entries)), f"{path}: {size} bytes"


def _write_beside(
    partial: Path, config: ModelConfig, form: Layout, tokenizer_path: Path | str | None
) -> None:
    """The tokenizer, and what Hugging Face's loaders expect next to it."""
    if form.name != "original" and config.vocab_size > LAST_SPECIAL:
        _write_json(partial / "generation_config.json", GENERATION)
    if tokenizer_path is None:
        return
    tokenizer = Path(tokenizer_path)
    _copy(tokenizer, partial / "tokenizer.json")
    for name in BESIDE if form.name != "original" else ():
        if (tokenizer.parent / name).is_file():
            _copy(tokenizer.parent / name, partial / name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    sync(target)


def _verify(partial: Path, config: ModelConfig, form: Layout, plan: dict[str, list[Entry]]) -> None:
    """What was written opens, and its headers promise what the layout does."""
    found = {
        name: (tensor.dtype, tensor.shape)
        for file in plan
        for name, tensor in safetensors.read(partial / file).items()
    }
    assert found == {e.name: (e.dtype, e.shape) for e in form.entries(config)}
    origin = str(partial / "config.json")
    ModelConfig.from_json(read_json(partial / "config.json"), origin=origin)


def _reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return report
