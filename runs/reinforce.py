"""GRPO and PPO on a skill that supervised training left unfinished: to think before answering.

    python -m runs.reinforce checkpoints/reinforce --seeds 0 1 2

The packaged nano model adds numbers in its analysis. A few steps of SFT on turns half of which
guess without a thought make it think only half of the time. From there, reward for exact answers
alone. Measured on held-out three-digit sums, four sampled answers each and a greedy one. Prints a
table, writes benchmarks/results/reinforce.json and docs/reinforce.svg; a run that has its result
already is not made again.
"""

import argparse
import json
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gptoss.backends.torch.modules import Transformer
from gptoss.bench.machine import describe
from gptoss.text.tokenizer import Tokenizer
from gptoss.train.config import Reading, TrainConfig
from gptoss.train.export import export
from gptoss.train.grpo import grpo
from gptoss.train.objective import Rollouts
from gptoss.train.ppo import ppo
from gptoss.train.recipes import load_run, sft, tokenizer_of
from gptoss.train.reward import Rewards
from gptoss.train.rollout import Sampler, prompt
from runs.nano import tasks

ROOT = Path(__file__).parents[1]
ROLLOUTS = Rollouts(prompts=8, group=8, max_tokens=128, batch_invariant=True)  # and twice as fast
RECIPES = {"grpo": grpo, "ppo": ppo}


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


def examine(model: Transformer, tokenizer: Tokenizer, lines: list[Any]) -> dict[str, float]:
    """Share of exact answers: four sampled at temperature 1 to each line, and a greedy one."""
    return {
        "sampled": share(model, tokenizer, lines, greedy=False),
        "greedy": share(model, tokenizer, lines, greedy=True),
    }


def share(
    model: Transformer, tokenizer: Tokenizer, lines: list[Any], *, greedy: bool, most: int = 128
) -> float:
    """One of both; ``most`` tokens of an answer."""
    asked = [prompt(line, tokenizer, "exam", room=2048) for line in lines]
    sampler = Sampler(model, tokenizer, Rewards(["exact"]), Rollouts(group=4, max_tokens=most))
    answers = sampler.draw(asked, seed=0, greedy=greedy)
    return sum(answer.reward for answer in answers) / len(answers)


def exam(count: int) -> list[dict[str, Any]]:
    """Held-out problems."""
    rng = random.Random("exam")
    return [asked(rng, exam=True) for _ in range(count)]


def start(out: Path, threads: int) -> Path:
    """The checkpoint that thinks half of the time."""
    rng, target = random.Random(0), out / "start"
    if not target.exists():
        config = TrainConfig(steps=40, lr=1e-3, warmup=5, threads=threads)
        data = write(out / "half.jsonl", [half_thinking(rng) for _ in range(4000)])
        sft("nano", [data], out / "sft", config=config, reading=Reading(tokens=2048))
        export(out / "sft", target, "huggingface-bf16")
    return target


@cache
def before(model: Path, count: int) -> dict[str, float]:
    """How that checkpoint does."""
    module = Transformer.from_checkpoint(model, dtype="float32", packed=False)
    return examine(module, Tokenizer.from_file(model / "tokenizer.json"), exam(count))


def prompts(out: Path) -> Path:
    """The problems to be rewarded for."""
    rng = random.Random(1)
    return write(out / "prompts.jsonl", [asked(rng, exam=False) for _ in range(2000)])


def config(steps: int, seed: int, threads: int, lr: float = 3e-4) -> TrainConfig:
    """How both recipes train: at a constant rate, so that nothing but the recipe ends a fall."""
    return TrainConfig(
        steps=steps, lr=lr, warmup=3, schedule="constant", seed=seed, threads=threads
    )


def main() -> None:
    """Spoil, reinforce, examine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=50, help="held-out problems")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/reinforce.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/reinforce.svg")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [reinforced(recipe, seed, args) for recipe in args.recipes for seed in args.seeds]
    print("| recipe | seed | exact before | exact after | greedy after | CPU-seconds |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        shares = " | ".join(f"{row[k]:.1%}" for k in ("before", "after", "greedy"))
        print(f"| {row['recipe']} | {row['seed']} | {shares} | {row['cpu_seconds']:.0f} |")
    asked_for = {k: getattr(args, k) for k in ("steps", "lr", "threads", "count")}
    found = {"benchmark": "reinforce", **asked_for, "results": rows, **describe()}
    args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture(rows, args.picture)


def reinforced(recipe: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run: the rewards of its rounds, and how exact answers were before and after it."""
    path = args.out / f"{recipe}-{seed}"
    told = path / "result.json"
    if told.exists():
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        return found
    model = start(args.out, args.threads)
    began = time.process_time()
    trainer = RECIPES[recipe](
        *(model, [prompts(args.out)], path, ["exact"]),
        config=config(args.steps, seed, args.threads, args.lr),
        rollouts=ROLLOUTS,
    )
    spent = time.process_time() - began
    trained, begun = load_run(path)
    after = examine(trained, tokenizer_of(begun), exam(args.count))
    found = {
        "recipe": recipe,
        "seed": seed,
        "before": before(model, args.count)["sampled"],
        "after": after["sampled"],
        "greedy": after["greedy"],
        "cpu_seconds": round(spent, 1),
        "rewards": [round(row["reward"], 4) for row in trainer.folder.rows()],
    }
    told.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps(found), flush=True)
    return found


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean reward by round: a panel for each recipe, a curve for each seed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["recipe"] for row in rows))
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        for row in rows:
            if row["recipe"] == name:
                rounds = range(1, len(row["rewards"]) + 1)
                axes.plot(rounds, row["rewards"], linewidth=1.2, label=f"seed {row['seed']}")
        axes.set(title=name.upper(), xlabel="round", ylim=(0, 1.03))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("exact answers, of 64 sampled")
    panels[-1].legend(loc="lower right")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "reinforce"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
