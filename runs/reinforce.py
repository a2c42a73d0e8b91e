"""GRPO and PPO on a skill that supervised training left unfinished: to think before answering.

    python -m runs.reinforce checkpoints/reinforce --seeds 0 1 2

The packaged nano model adds numbers in its analysis. A few steps of SFT on turns half of which
guess without a thought make it think only half of the time. From there, reward for exact answers
alone. Measured on held-out three-digit sums, four sampled answers each and a greedy one. Prints a
table, ends with one JSON line.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from gptoss.backends.torch.modules import Transformer
from gptoss.text.tokenizer import Tokenizer
from gptoss.train.config import Reading, TrainConfig
from gptoss.train.export import export
from gptoss.train.grpo import grpo
from gptoss.train.objective import Grpo, Ppo, Rollouts
from gptoss.train.ppo import ppo
from gptoss.train.recipes import load_run, sft, tokenizer_of
from gptoss.train.reward import Rewards
from gptoss.train.rollout import Prompt, Sampler, prompt
from runs.nano import tasks

ROLLOUTS = Rollouts(prompts=8, group=8, max_tokens=128)


def problem(rng: random.Random, *, exam: bool) -> tuple[str, str, str]:
    """A question about three-digit numbers, nano's analysis of it, and the answer."""
    while True:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        if tasks.held_out(f"add {min(a, b)} {max(a, b)}") == exam:
            analysis = f"{a}+{b} by columns: {tasks.sum_steps(a, b)[1]}. So {a + b}."
            return f"What is {a} + {b}?", analysis, f"{a} + {b} = {a + b}"


def half_thinking(rng: random.Random) -> dict[str, Any]:
    """A line for SFT: every other turn guesses."""
    question, analysis, answer = problem(rng, exam=False)
    turns = [{"role": "user", "content": question}]
    if rng.random() < 0.5:
        turns.append({"role": "assistant", "channel": "analysis", "content": analysis})
    else:
        answer = answer.split("=")[0] + f"= {rng.randrange(200, 2000)}"
    return {"messages": [*turns, {"role": "assistant", "channel": "final", "content": answer}]}


def asked(rng: random.Random, *, exam: bool) -> dict[str, Any]:
    """A line for reinforcement, or the examination."""
    question, _, answer = problem(rng, exam=exam)
    return {"messages": [{"role": "user", "content": question}], "answer": answer}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def examine(model: Transformer, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Share of exact answers to held-out problems: sampled at temperature 1, and greedy."""
    rng = random.Random("exam")
    drawn = [prompt(asked(rng, exam=True), tokenizer, "exam", room=2048) for _ in range(count)]
    sampler = Sampler(model, tokenizer, Rewards(["exact"]), Rollouts(group=4, max_tokens=128))

    def share(prompts: list[Prompt], *, greedy: bool) -> float:
        answers = sampler.draw(prompts, seed=0, greedy=greedy)
        return sum(answer.reward for answer in answers) / len(answers)

    return {"sampled": share(drawn, greedy=False), "greedy": share(drawn, greedy=True)}


def start(out: Path, config: TrainConfig) -> Path:
    """The checkpoint that thinks half of the time."""
    rng, target = random.Random(0), out / "start"
    if not target.exists():
        data = write(out / "half.jsonl", [half_thinking(rng) for _ in range(4000)])
        sft("nano", [data], out / "sft", config=config, reading=Reading(tokens=2048))
        export(out / "sft", target, "huggingface-bf16")
    return target


def main() -> None:
    """Spoil, reinforce, examine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["grpo", "ppo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=50, help="held-out problems")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spoil = TrainConfig(steps=40, lr=1e-3, warmup=5, threads=args.threads)
    model = start(args.out, spoil)
    rng = random.Random(1)
    data = write(args.out / "prompts.jsonl", [asked(rng, exam=False) for _ in range(2000)])
    rows = []
    for recipe in args.recipes:
        for seed in args.seeds:
            rows.append(reinforced(recipe, seed, model, data, args))
            print(json.dumps(rows[-1]), flush=True)
    print("| recipe | seed | exact before | after | greedy after | CPU-seconds |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        shares = " | ".join(f"{row[k]:.1%}" for k in ("before", "after", "greedy"))
        print(f"| {row['recipe']} | {row['seed']} | {shares} | {row['cpu_seconds']:.0f} |")
    print(json.dumps(rows))


def reinforced(
    recipe: str, seed: int, model: Path, data: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One run, and how exact the answers were before and after it."""
    config = TrainConfig(
        steps=args.steps, lr=args.lr, warmup=3, schedule="constant", seed=seed, threads=args.threads
    )
    path, began = args.out / f"{recipe}-{seed}", time.process_time()
    if recipe == "grpo":
        grpo(model, [data], path, ["exact"], config=config, rollouts=ROLLOUTS, objective=Grpo())
    else:
        ppo(model, [data], path, ["exact"], config=config, rollouts=ROLLOUTS, objective=Ppo())
    spent = time.process_time() - began
    trained, begun = load_run(path)
    tokenizer = tokenizer_of(begun)
    before = examine(
        Transformer.from_checkpoint(model, dtype="float32", packed=False), tokenizer, args.count
    )
    after = examine(trained, tokenizer, args.count)
    return {
        "recipe": recipe,
        "seed": seed,
        "before": before["sampled"],
        "after": after["sampled"],
        "greedy": after["greedy"],
        "cpu_seconds": spent,
    }


if __name__ == "__main__":
    main()
