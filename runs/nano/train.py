"""Train the nano model from nothing, in plain PyTorch, on a CPU.

    python -m runs.nano.train --out checkpoints/nano-run

Matrices are trained by Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/), everything
else by AdamW. The loss is on the model's own turns only. ``state.pt`` in the output directory is
replaced atomically every few hundred steps; the same command continues from it.
"""

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss.backends.torch.modules import Transformer
from gptoss.model.config import nano
from gptoss.text import harmony
from gptoss.text.tokenizer import Tokenizer
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
IGNORE = -100  # cross-entropy's label for "not learned from"


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


def batches(tokenizer: Tokenizer, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens [b, n], labels [b, n]) of conversations of like length, padded on the right.

    What is learned first is to look at the question: a few tasks at a time and short conversations.
    From the whole mixture at once the model had not begun to copy a digit after 750 steps; from
    sums alone it does after 150.
    """
    rng = random.Random(seed)
    for step in itertools.count(0, 16):
        shares = next(shares for end, shares in STAGES if step < end)
        bare = max(0.3, min(1.0, (BARE[1] - step) / (BARE[1] - BARE[0])))
        drawn = (
            tasks.example(
                rng,
                task=rng.choices(list(shares), list(shares.values()))[0],
                bare=rng.random() < bare,
            )
            for _ in range(size * 16)
        )
        pool = sorted((tokens_of(each, tokenizer) for each in drawn), key=lambda pair: len(pair[0]))
        groups = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            tokens = torch.zeros(len(group), longest, dtype=torch.long)
            labels = torch.full((len(group), longest), IGNORE)
            for row, (ids, said) in enumerate(group):
                whole = torch.tensor(ids)
                tokens[row, : len(ids)] = whole
                learned = torch.where(torch.tensor(said).bool(), whole, IGNORE)
                labels[row, : len(ids) - 1] = learned[1:]
            yield tokens, labels


def loss_of(
    model: Transformer, tokens: Tensor, labels: Tensor, balance: float
) -> tuple[Tensor, Tensor]:
    """(cross-entropy of the learned tokens, the same plus the load-balancing term).

    Load balancing: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equation 4.
    """
    routed: dict[str, Tensor] = {}

    def trace(name: str, x: Tensor) -> None:
        if name.endswith((".gate", ".chosen")):
            routed[name] = x

    flat = labels.flatten()
    wanted = (flat != IGNORE).nonzero().squeeze(1)
    logits = model(tokens, wanted=wanted, trace=trace)
    loss = F.cross_entropy(logits, flat[wanted])
    uneven = torch.zeros(())
    for name, scores in routed.items():
        if name.endswith(".gate"):
            experts = scores.shape[-1]
            chosen = routed[name.removesuffix("gate") + "chosen"].flatten()
            load = chosen.bincount(minlength=experts) / len(chosen)
            uneven = uneven + experts * (load * scores.softmax(-1).mean(0)).sum()
    return loss, loss + balance * uneven


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps; for (stacks of) matrices."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                gain = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * gain)


def orthogonal(g: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to [..., rows, columns], roughly."""
    x = g if g.shape[-2] <= g.shape[-1] else g.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if g.shape[-2] <= g.shape[-1] else x.mT


def optimizers(model: Transformer, muon: float, adam: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    inside = {n for n, p in model.block.named_parameters() if p.dim() > 1 and "bias" not in n}
    inside = {n for n in inside if "gate" not in n}
    matrices = [p for n, p in model.block.named_parameters() if n in inside]
    rest = [p for n, p in model.named_parameters() if n.removeprefix("block.") not in inside]
    return [
        Muon(matrices, lr=muon),
        torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int) -> float:
    """Fraction of the peak learning rate: straight lines between the corners of ``RATE``."""
    steps, fractions = zip(*RATE, strict=True)
    return float(np.interp(step, steps, fractions))


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


def save_state(path: Path, **state: object) -> None:
    """Replace ``path`` in one go."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def main() -> None:
    """Train, or continue."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32, help="conversations a step")
    parser.add_argument("--muon", type=float, default=0.015, help="peak learning rate of matrices")
    parser.add_argument("--adam", type=float, default=3e-3, help="peak learning rate of the rest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--examine-every", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = vocabulary.build(seed=args.seed)
    tasks.KNOWN[:] = vocabulary.known(tokenizer)
    tokenizer.save(args.out / "tokenizer.json")
    torch.manual_seed(args.seed)
    model = Transformer(nano())
    tools = optimizers(model, args.muon, args.adam)
    first, state = 0, args.out / "state.pt"
    if state.exists():
        saved = torch.load(state)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        for tool, its in zip(tools, saved["optimizers"], strict=True):
            tool.load_state_dict(its)
    data = batches(tokenizer, args.batch, args.seed)
    for _ in range(first):
        next(data)
    log, started, seen = (args.out / "log.jsonl").open("a"), time.perf_counter(), 0
    for step in range(first, args.steps):
        tokens, labels = next(data)
        for tool, peak in zip(tools, (args.muon, args.adam), strict=True):
            tool.param_groups[0]["lr"] = peak * schedule(step)
            tool.zero_grad()
        loss, total = loss_of(model, tokens, labels, balance=0.01)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
        seen += tokens.numel()
        if (step + 1) % 20 == 0:
            row = {"step": step + 1, "loss": round(loss.item(), 4)}
            row |= {"tokens_per_second": round(seen / (time.perf_counter() - started))}
            print(json.dumps(row), file=log, flush=True)
        if (step + 1) % args.examine_every == 0 or step + 1 == args.steps:
            marks = examine(model, tokenizer, 40)
            print(json.dumps({"step": step + 1, "exact": marks}), file=log, flush=True)
            states = [tool.state_dict() for tool in tools]
            save_state(state, step=step + 1, model=model.state_dict(), optimizers=states)


if __name__ == "__main__":
    main()
