"""Questions for the last stage of training, reinforcement: JSON lines with their answers.

    python -m runs.nano.prompts checkpoints/nano-run prompts.jsonl

Problems that are not held out, in the shares of ``SHARES``: mostly what teaching left unsure, and
half of them at low effort, where least is written down.
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptoss.text.messages import Developer, System
from gptoss.text.tokenizer import Tokenizer
from runs.nano import tasks, vocabulary

SHARES = {"reverse": 6, "subtract": 5, "add": 3, "sort": 3, "count": 2, "compare": 1, "talk": 1}
EFFORTS = (2, 1, 1)  # low, medium, high


def line(example: tasks.Example) -> dict[str, Any]:
    """What ``gptoss train grpo`` reads."""
    messages: list[dict[str, Any]] = []
    found: dict[str, Any] = {"messages": messages, "answer": example.turn[-1].content}
    for message in example.prompt:
        match message.content:
            case System(effort=effort, current_date=date):
                found |= {"effort": effort, "current_date": date}
            case Developer(tools=tools):
                found["tools"] = [asdict(tool) for tool in tools]
            case text:
                messages.append({"role": message.role, "content": text})
                if message.channel:
                    messages[-1]["channel"] = message.channel
    return found


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="whose tokenizer says which words are known")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tasks.KNOWN[:] = vocabulary.known(Tokenizer.from_file(args.run / "tokenizer.json"))
    rng = random.Random(f"prompts {args.seed}")
    with args.out.open("w", encoding="utf-8") as file:
        for _ in range(args.count):
            task = rng.choices(list(SHARES), list(SHARES.values()))[0]
            effort = rng.choices(tasks.EFFORTS, EFFORTS)[0]
            print(json.dumps(line(tasks.example(rng, task=task, effort=effort))), file=file)


if __name__ == "__main__":
    main()
