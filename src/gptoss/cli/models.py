"""``gptoss models``: what can be run, and what it takes.

gptoss models
gptoss models --json | jq '.found[].name'
"""

import json
from typing import Any

from gptoss.cli import options


def run(json_: options.Json = False) -> None:
    """The published sizes, and the checkpoints on this machine."""
    from gptoss.llm.memory import available_memory
    from gptoss.llm.models import found

    here = [
        {
            "name": item.name,
            "path": str(item.checkpoint.path),
            "layout": item.checkpoint.layout.name,
            "bytes": item.checkpoint.nbytes,
        }
        for item in found()
    ]
    facts = {"published": published(), "found": here, "available_memory": available_memory()}
    if json_:
        print(json.dumps(facts))
    else:
        print_facts(facts)


def published() -> list[dict[str, Any]]:
    """The two released models, by their shapes."""
    from gptoss.llm.models import PUBLISHED
    from gptoss.llm.needs import BYTES, PACKED, counts, estimate
    from gptoss.llm.plan import ROOM
    from gptoss.model.config import PRESETS

    rows = []
    for short, name in PUBLISHED.items():
        config = PRESETS[short]()
        dense, experts = counts(config)
        rows.append(
            {
                "name": short,
                "id": name,
                "layers": config.num_hidden_layers,
                "experts": config.num_experts,
                "parameters": dense + experts,
                "bytes": round(dense * BYTES["bfloat16"] + experts * PACKED),
                "memory": estimate(config, "torch", "bfloat16", ROOM).total,
                "memory_for_tokens": ROOM,
            }
        )
    return rows


def print_facts(facts: dict[str, Any]) -> None:
    """The same for people."""
    from gptoss.llm.plan import size

    for row in facts["published"]:
        print(
            f"{row['name']:<6} {row['id']}: {row['parameters'] / 1e9:.1f} B parameters, "
            f"{row['layers']} layers of {row['experts']} experts; {size(row['bytes'])} on disk, "
            f"{size(row['memory'])} of memory for {row['memory_for_tokens']} tokens in bfloat16"
        )
    print()
    for row in facts["found"]:
        print(f"{row['name']}: {row['layout']} layout, {size(row['bytes'])}")
    if not facts["found"]:
        print("no checkpoint in ./checkpoints or in the Hugging Face cache")
    have = facts["available_memory"]
    print(f"\nmemory free: {'unknown' if have is None else size(have)}")
