"""``gptoss inspect``: what is in a checkpoint, read from headers alone (fast, no torch).

gptoss inspect
gptoss inspect checkpoints/20b --json | jq '.tensors[0]'
gptoss inspect openai/gpt-oss-20b --check
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from gptoss.cli import options
from gptoss.cli.arguments import Option

if TYPE_CHECKING:
    from gptoss.checkpoint.open import Checkpoint


def run(
    model: options.Model = "nano",
    json_: options.Json = False,
    check: Annotated[
        bool, Option("--check", help="read every weight and refuse NaN and infinity")
    ] = False,
) -> None:
    """Config, layout and every tensor of a checkpoint."""
    from gptoss.checkpoint.open import open_checkpoint
    from gptoss.llm.models import resolve

    checkpoint = open_checkpoint(resolve(model))
    if check:
        checkpoint.check()
    facts = describe(checkpoint) | ({"finite": True} if check else {})
    if json_:
        print(json.dumps(facts))
    else:
        print_facts(facts)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything the headers say."""
    from gptoss.llm.needs import parameters

    tokenizer = checkpoint.tokenizer_path
    return {
        "path": str(checkpoint.path),
        "layout": checkpoint.layout.name,
        "files": [str(file) for file in checkpoint.files],
        "bytes": checkpoint.nbytes,
        "parameters": parameters(checkpoint.config),
        "context_length": checkpoint.config.context_length,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "config": asdict(checkpoint.config),
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
            for t in checkpoint.tensors.values()
        ],
    }


def print_facts(facts: dict[str, Any]) -> None:
    """The same for people, tensors in the order of the files."""
    tensors, config = facts.pop("tensors"), facts.pop("config")
    facts["files"] = len(facts["files"])
    for name, value in {**facts, **config}.items():
        print(f"{name:24} {f'{value:,}' if type(value) is int else value}")
    print()
    for t in tensors:
        print(f"{t['bytes']:>14,}  {t['dtype']:<5} {t['shape']!s:<24} {t['name']}")
    print(f"{sum(t['bytes'] for t in tensors):>14,}  bytes in {len(tensors)} tensors")
