"""What training leaves in four bits: exact answers before it, after it, and after MXFP4 export.

    python -m runs.finetune checkpoints/finetune

nano adds two numbers in its analysis; it never saw a sum doubled. SFT teaches that with everything
trained, with adapters, and for MXFP4 (``--qat``); the half-thinking model of ``runs.reinforce``
learns from rewards, for MXFP4 too. What is trained answers in float32, what is exported in the
native backend, as a user would get it. Prints a table, writes benchmarks/results/sft.json; a way
that has its result already is not tried again.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gptoss import LLM
from gptoss.bench.machine import describe
from gptoss.train.config import Reading, TrainConfig, Tuning
from gptoss.train.export import export
from gptoss.train.grpo import grpo
from gptoss.train.recipes import load_run, sft, tokenizer_of
from runs import reinforce
from runs.nano import tasks

MOST = 256  # tokens of an answer
SFT = {  # (what is trained, peak rate)
    "sft": (Tuning(), 1e-3),
    "sft --lora 8": (Tuning(lora=8), 3e-3),
    "sft --qat least_squares": (Tuning(qat="least_squares"), 1e-3),
}
GRPO = {"grpo": Tuning(), "grpo --qat least_squares": Tuning(qat="least_squares")}
NAMES = {  # directories of the runs; GRPO's first is the one of ``runs.reinforce``, if it is there
    "sft": "sft-full",
    "sft --lora 8": "sft-lora",
    "sft --qat least_squares": "sft-qat",
    "grpo": "grpo-0",
    "grpo --qat least_squares": "grpo-qat",
}


def doubled(rng: random.Random, *, exam: bool) -> dict[str, Any]:
    """A conversation for SFT; for the examination the question alone, and its answer."""
    while True:
        a, b = rng.randrange(100, 500), rng.randrange(100, 500)
        if tasks.held_out(f"add and double {a} {b}") == exam:
            break
    s = a + b
    first, second = (f"{x}+{y} by columns: {tasks.sum_steps(x, y)[1]}" for x, y in ((a, b), (s, s)))
    user = {"role": "user", "content": f"Add {a} and {b}, then double it."}
    answer = f"Twice {s} is {2 * s}."
    if exam:
        return {"messages": [user], "answer": answer}
    analysis = f"{first}. So {s}. {second}. So {2 * s}."
    said = ({"channel": "analysis", "content": analysis}, {"channel": "final", "content": answer})
    return {"messages": [user, *({"role": "assistant", **turn} for turn in said)]}


def native(path: Path | str, lines: list[dict[str, Any]], temperature: float) -> float:
    """Share of exact answers of a checkpoint in the native backend; four to each line if drawn."""
    llm, times = LLM.load(path, "native"), 4 if temperature else 1
    right = [
        llm.chat(line["messages"], temperature=temperature, max_tokens=MOST, seed=seed).text
        == line["answer"]
        for seed, line in enumerate(line for line in lines for _ in range(times))
    ]
    return sum(right) / len(right)


def supervised(way: str, path: Path, args: argparse.Namespace) -> None:
    """SFT in one of its ways."""
    tuning, rate = SFT[way]
    rng = random.Random(0)
    lines = [doubled(rng, exam=False) for _ in range(4000)]
    data = reinforce.write(args.out / "doubled.jsonl", lines)
    config = TrainConfig(steps=args.steps, lr=rate, warmup=10, threads=args.threads)
    sft("nano", [data], path, config=config, reading=Reading(tokens=2048), tuning=tuning)


def rewarded(way: str, path: Path, args: argparse.Namespace) -> None:
    """GRPO, as in ``runs.reinforce``."""
    grpo(
        *(reinforce.start(args.out, args.threads), [reinforce.prompts(args.out)], path, ["exact"]),
        config=reinforce.config(args.rounds, seed=0, threads=args.threads),
        rollouts=replace(reinforce.ROLLOUTS, batch_invariant=not GRPO[way].qat),
        tuning=GRPO[way],
    )


def exam(way: str, count: int) -> list[dict[str, Any]]:
    """Held-out problems."""
    rng = random.Random("exam")
    return [(doubled if way in SFT else reinforce.asked)(rng, exam=True) for _ in range(count)]


@cache
def before(supervised: bool, out: Path, count: int) -> float:
    """What the model could do that training began with."""
    if supervised:
        return native("nano", exam("sft", count), 0.0)
    return reinforce.before(out / "start", count)["sampled"]


def tried(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """One way: trained, exported, examined; SFT's answers are greedy, the others sampled."""
    path = args.out / NAMES[way]
    told = path / "packed.json"
    if told.exists():
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        return found
    lines, greedy = exam(way, args.count), way in SFT
    there, began = (path / "states").exists(), time.process_time()
    (supervised if greedy else rewarded)(way, path, args)
    spent = time.process_time() - began
    trained, begun = load_run(path)
    marks = reinforce.share(trained, tokenizer_of(begun), lines, greedy=greedy, most=MOST)
    report = export(path, path / "packed")
    found = {
        "way": way,
        "answers": "greedy" if greedy else "sampled",
        "before": before(greedy, args.out, args.count),
        "trained": marks,
        "exported": native(path / "packed", lines, 0.0 if greedy else 1.0),
        "experts_moved": sum(row["relative"] for row in report.experts) / len(report.experts),
        "cpu_seconds": None if there else round(spent, 1),
    }
    told.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Train, export, examine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--ways", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--steps", type=int, default=100, help="of SFT")
    parser.add_argument("--rounds", type=int, default=20, help="of GRPO")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=100, help="held-out problems")
    parser.add_argument(
        "--results", type=Path, default=reinforce.ROOT / "benchmarks/results/sft.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [tried(way, args) for way in args.ways]
    print("| | exact before | trained | exported |")
    print("|---|---|---|---|")
    for row in rows:
        shares = " | ".join(f"{row[k]:.1%}" for k in ("before", "trained", "exported"))
        print(f"| {row['way']} | {shares} |")
    asked_for = {k: getattr(args, k) for k in ("steps", "rounds", "threads", "count")}
    found = {"benchmark": "sft", **asked_for, "results": rows, **describe()}
    args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
