"""How far the sampler's log-probabilities are from the trainer's, and what closing the gap costs.

    python benchmarks/sampler_vs_trainer.py
    python benchmarks/sampler_vs_trainer.py --prompts 2 --group 2 --out /tmp/small.json

The packaged nano model answers questions it has never seen the like of, so that its words are not
certain, and a round is drawn, scored and learned from: in float32 and bfloat16, as it is, with
``batch_invariant`` and with ``replay_routing``. ``gap`` and ``gap_most``: nats a token, mean and
most; ``rerouted``: choices of experts that the trainer would have made otherwise. Speeds are tokens
drawn, scored and learned from a second of CPU time, the best of some rounds.

Prints a table and ends with one JSON line.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from vs_llamacpp import ROOT, finish

from gptoss.backends.torch.modules import Transformer
from gptoss.llm.models import NANO
from gptoss.text.tokenizer import Tokenizer
from gptoss.train.config import TrainConfig
from gptoss.train.grpo import GroupRelative
from gptoss.train.objective import Grpo, Rollouts
from gptoss.train.reinforce import prompts_of, rounds_of
from gptoss.train.reward import Rewards

MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, batch_invariant": {"batch_invariant": True},
    "bfloat16 autocast": {"autocast": True},
    "bfloat16 autocast, replay_routing": {"autocast": True, "replay_routing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, replay_routing": {"dtype": "bfloat16", "replay_routing": True},
}


def main() -> None:
    """Measure each mode, report."""
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(f"{json.dumps(question(i))}\n" for i in range(args.prompts)))
        figures = {name: measured(path, args, **mode) for name, mode in MODES.items()}
    print(table(figures))
    job = {name: getattr(args, name) for name in ("prompts", "group", "threads", "rounds")}
    facts = {"benchmark": "sampler_vs_trainer", "model": "nano", **job, "results": figures}
    finish(args.out or ROOT / "benchmarks" / "results" / "sampler_vs_trainer.json", facts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="answers to each")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def question(i: int) -> dict[str, Any]:
    """A line of the data."""
    who, what = chr(97 + i % 26) * 3, chr(65 + i * 7 % 26)
    content = f"Why do {who} and {what}{i} like the colour of time, and who said so?"
    return {"messages": [{"role": "user", "content": content}]}


def even(prompt: Any, reply: str, messages: Any, example: Any) -> float:
    """A reward that differs between answers."""
    return float(len(reply) % 2)


def measured(path: Path, args: argparse.Namespace, **mode: Any) -> dict[str, float]:
    """Some rounds of one mode, always of the same answers."""
    dtype, autocast = mode.pop("dtype", "float32"), mode.pop("autocast", False)
    config = TrainConfig(threads=args.threads, autocast=autocast)
    group = {"prompts": args.prompts, "group": args.group, "max_tokens": 64}
    rollouts = Rollouts(**group, truncated=0.5, gap=9.0, **mode)
    tokenizer = Tokenizer.from_file(NANO / "tokenizer.json")
    model = Transformer.from_checkpoint(NANO, "cpu", dtype, packed=False)
    corpus, recipe = prompts_of([path], tokenizer, 2048), GroupRelative(Grpo(), args.group)
    run = rounds_of(model, tokenizer, corpus, Rewards([even]), recipe, config, rollouts)
    speeds: list[tuple[float, float, float]] = []
    for _ in range(args.rounds):
        times = [time.process_time()]
        answers = run.sampler.draw([run._prompt(i) for i in range(args.prompts)], seed=0)
        times.append(time.process_time())
        [step] = run._steps(answers)
        gap = run._gap([step])
        recipe.advise(answers, [step], {})
        times.append(time.process_time())
        for minibatch in step:
            run.loss(minibatch)[0].backward()  # type: ignore[no-untyped-call]
        times.append(time.process_time())
        drawn = sum(len(answer.tokens) for answer in answers)
        read = sum(len(m.batch.tokens) for m in step if m.batch is not None)
        each = zip((drawn, read, read), times, times[1:], strict=False)
        speeds.append(tuple(n / (after - before) for n, before, after in each))  # type: ignore[arg-type]
    best = dict(
        zip(("drawn", "scored", "learned"), map(max, zip(*speeds, strict=True)), strict=True)
    )
    return {**gap, **best, "tokens": float(drawn)}


def table(figures: dict[str, dict[str, float]]) -> str:
    """One row for each mode."""
    rows = [
        "| | gap, mean | most | rerouted | drawn/s | scored/s | learned/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in figures.items():
        rerouted = f"{found['rerouted']:.2%}" if "rerouted" in found else ""
        speeds = " | ".join(f"{found[what]:,.0f}" for what in ("drawn", "scored", "learned"))
        rows.append(
            f"| {name} | {found['gap']:.1e} | {found['gap_most']:.1e} | {rerouted} | {speeds} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
