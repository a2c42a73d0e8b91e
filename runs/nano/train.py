"""Train the nano model from nothing, in plain PyTorch, on a CPU; or a grown one from what it knows.

    python -m runs.nano.train --out checkpoints/nano-run
    python -m runs.nano.train --out checkpoints/sibling-run --grown checkpoints/grown --steps 500

Matrices are trained by Muon, everything else by AdamW, with the trainer of ``gptoss.train``; here
is only what is the model's own: its data, its stages and its learning rate. The loss is on the
model's own turns only. The same command continues where an earlier one was stopped.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptoss.backends.torch.modules import Transformer
from gptoss.text import harmony
from gptoss.text.tokenizer import Tokenizer
from gptoss.train.batch import IGNORE, Batch, Document, collate
from gptoss.train.config import TrainConfig, Tuning
from gptoss.train.loss import cross_entropy
from gptoss.train.recipes import build
from gptoss.train.trainer import Trainer
from runs.nano import tasks, vocabulary

STAGES = (  # (until this step, shares of the tasks)
    (128, {"add": 1}),
    (480, {"reverse": 5, "count": 5, "add": 2}),
    (800, {"sort": 4, "tool": 3, "compare": 3, "subtract": 3, "reverse": 2, "count": 2, "add": 1}),
    (4500, tasks.SHARES),
    (7000, tasks.SHARES | {"add": 9, "subtract": 13, "reverse": 16, "count": 22}),
    (1 << 30, tasks.SHARES | {"subtract": 18, "compare": 10, "reverse": 22, "count": 14}),
)
BARE = (1104, 1296)  # until the first step every conversation is bare, from the second three in ten
RATE = ((0, 0.01), (100, 1), (2000, 1), (4000, 0.4), (4500, 0.30125), (7000, 0.25), (9000, 0.003))
GROWN = ((0, 0.01), (0.1, 0.3), (0.6, 0.25), (1, 0.003))  # of a grown model, by share of its steps
TAUGHT = 9000  # steps: a grown model goes on where the data of so many ended
POOL = 16  # steps whose conversations are drawn and sorted together


def tokens_of(example: tasks.Example, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A whole conversation, and per token whether the model is to say it."""
    ids = harmony.render_for_completion(example.prompt, tokenizer, keep_analysis=True)
    said = [0] * len(ids)
    head = harmony.render_for_completion([], tokenizer)  # <|start|>assistant
    for message in example.turn:
        one = harmony.render([message], tokenizer, keep_analysis=True)
        if message is example.turn[0]:
            one = one[len(head) :]
        if message is example.turn[-1]:
            one[-1] = tokenizer.special("<|return|>")
        ids += one
        said += [int(message.role == "assistant")] * len(one)
    return ids, said


def drawer(
    tokenizer: Tokenizer, size: int, seed: int, first: int = 0
) -> Callable[[Any], tuple[list[Batch], int]]:
    """``draw`` of a run: at each step some conversations of like length; a position is a step, of
    which the run's own is ``first``.

    What is learned first is to look at the question: a few tasks at a time and short conversations.
    From the whole mixture at once the model had not begun to copy a digit after 750 steps; from
    sums alone it does after 150.
    """

    @lru_cache(maxsize=1)
    def pool(number: int) -> list[list[Document]]:
        """The conversations of sixteen steps."""
        rng, step = random.Random(f"{seed} {number}"), POOL * number
        shares = next(shares for end, shares in STAGES if step < end)
        bare = max(0.3, min(1.0, (BARE[1] - step) / (BARE[1] - BARE[0])))
        drawn = []
        for _ in range(size * POOL):
            task = rng.choices(list(shares), list(shares.values()))[0]
            example = tasks.example(rng, task=task, bare=rng.random() < bare)
            drawn.append(document(*tokens_of(example, tokenizer), origin=task))
        drawn.sort(key=lambda each: len(each.tokens))
        groups = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        rng.shuffle(groups)
        return groups

    def draw(position: Any) -> tuple[list[Batch], int]:
        step = first if position is None else position
        return collate([pool(step // POOL)[step % POOL]]), step + 1

    return draw


def document(ids: list[int], said: list[int], origin: str) -> Document:
    """A conversation of which only what the model says is learned."""
    targets = [token if s else IGNORE for token, s in zip(ids[1:], said[1:], strict=True)]
    return Document(ids[:-1], targets, origin)


def schedule(corners: tuple[tuple[float, float], ...], at: float) -> float:
    """Fraction of the peak learning rate: straight lines between ``corners``."""
    places, fractions = zip(*corners, strict=True)
    return float(np.interp(at, places, fractions))


@torch.no_grad()
def examine(model: Transformer, tokenizer: Tokenizer, n: int, seed: int = 7) -> dict[str, float]:
    """Share of held-out turns, per task, in which every token is the likeliest one."""
    right: dict[str, list[bool]] = {}
    rng = random.Random(seed)
    for task in tasks.SHARES:
        pairs = [tokens_of(tasks.example(rng, task=task, exam=True), tokenizer) for _ in range(n)]
        for ids, said in pairs:
            best = model(torch.tensor(ids)).argmax(-1)[:-1].tolist()
            told = zip(best, ids[1:], said[1:], strict=True)
            right.setdefault(task, []).append(all(b == t for b, t, s in told if s))
    return {task: sum(r) / len(r) for task, r in right.items()}


def main() -> None:
    """Train, or continue."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grown", type=Path, help="a checkpoint to begin with, of runs.nano.grow")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32, help="conversations a step")
    parser.add_argument("--muon", type=float, default=0.015, help="peak learning rate of matrices")
    parser.add_argument("--adam", type=float, default=3e-3, help="peak learning rate of the rest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--examine-every", type=int, default=250)
    args = parser.parse_args()
    config = TrainConfig(
        steps=args.steps,
        lr=args.adam,
        muon=args.muon,
        balance=0.04,
        seed=args.seed,
        threads=args.threads,
        save_every=args.examine_every,
    )
    asked = {"recipe": "pretrain", "model": "nano", "tokenizer": None} | asdict(Tuning())
    if args.grown:
        asked |= {"recipe": "sft", "model": str(args.grown)}
        tokenizer = Tokenizer.from_file(args.grown / "tokenizer.json")
    else:
        tokenizer = vocabulary.build(seed=args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(args.out / "tokenizer.json")
        asked["tokenizer"] = str(args.out / "tokenizer.json")
    tasks.KNOWN[:] = vocabulary.known(tokenizer)
    torch.manual_seed(args.seed)
    model = build(asked, "cpu")

    def share(step: int) -> float:
        return schedule(GROWN, step / args.steps) if args.grown else schedule(RATE, step)

    def watch(row: dict[str, Any]) -> None:
        if row["step"] % args.examine_every == 0 or row["step"] == args.steps:
            marks = examine(model, tokenizer, 40)
            with (args.out / "exact.jsonl").open("a") as log:
                print(json.dumps({"step": row["step"], "exact": marks}), file=log)

    trainer: Trainer[Batch] = Trainer(
        model, config, args.out, asked=asked | {"batch": args.batch}, share=share, watch=watch
    )
    trainer.run(
        drawer(tokenizer, args.batch, args.seed, TAUGHT if args.grown else 0),
        lambda batch: cross_entropy(model, batch, config),
    )


if __name__ == "__main__":
    main()
