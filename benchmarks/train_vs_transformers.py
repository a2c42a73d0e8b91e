"""A training step of transformers (eager attention) and of this package: seconds, memory, loss.

    python benchmarks/train_vs_transformers.py
    python benchmarks/train_vs_transformers.py --length 512 --rounds 1 --out /tmp/small.json
    python benchmarks/train_vs_transformers.py --layer   # one of 20b, LoRA over packed experts

Both train the same random weights, all of them, in float32, with AdamW, on the same tokens, each in
a process of its own, turn by turn. ``step_bytes`` is the most that the process has had resident
less what it had with the model loaded: gradients, AdamW's moments, activations.

Prints a table and ends with one JSON line.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from vs_llamacpp import ROOT, asked, cores, finish, peak

HERE = Path(__file__).resolve()
PYTHON = Path(sys.executable)
CONTENDERS = ("transformers eager", "ours", "ours, recomputed")
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 256,
    "vocab_size": 8192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "experts_per_token": 2,
}


def main() -> None:
    """Write the model, measure by turns, report."""
    args = arguments()
    job = {"length": args.length, "steps": args.steps, "threads": args.threads}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        job |= {"model": write(Path(folder) / "model", layer=args.layer)}
        names = ("LoRA, packed experts",) if args.layer else CONTENDERS
        rounds = [
            {name: asked(PYTHON, {**job, "who": name}, name, HERE) for name in names}
            for _ in range(args.rounds)
        ]
    figures = {
        name: {key: median(each[name][key] for each in rounds) for key in rounds[0][name]}
        for name in names
    }
    print(table(figures))
    what = "train_layer_20b" if args.layer else "train_vs_transformers"
    facts = {"benchmark": what, **job, "model": {} if args.layer else SMALL, "results": figures}
    finish(args.out or ROOT / "benchmarks" / "results" / f"{what}.json", facts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens of the one sequence")
    parser.add_argument("--steps", type=int, default=3, help="of which the median counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--layer", action="store_true", help="one layer of 20b, with its words")
    parser.add_argument("--scratch", type=Path, help="where the model is written")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write(path: Path, *, layer: bool) -> str:
    """A random model: the small one, or one layer of 20b as published."""
    from gptoss.checkpoint.synthesize import synthesize
    from gptoss.model.config import gpt_oss_20b

    config = replace(gpt_oss_20b(), **({"num_hidden_layers": 1} if layer else SMALL))
    return str(synthesize(config, path, "huggingface" if layer else "huggingface-bf16"))


def work(job: dict[str, Any]) -> dict[str, float]:
    """In the fresh process: some steps."""
    import torch

    torch.set_num_threads(job["threads"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(8000, (job["length"] + 1,), generator=generator)
    step = {"transformers eager": theirs}.get(job["who"], ours)(job, tokens)
    before, seconds, losses = resident(), [], []
    for _ in range(job["steps"]):
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
    highest = peak() or 0
    return {
        "tokens_per_second": job["length"] / median(seconds),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "step_bytes": highest - before,
        "peak_bytes": highest,
    }


def theirs(job: dict[str, Any], tokens: Any) -> Callable[[], float]:
    """One step of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="eager"
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    row = tokens[None]

    def step() -> float:
        optimizer.zero_grad()
        loss = model(row[:, :-1], labels=row[:, 1:], shift_labels=row[:, 1:], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step


def ours(job: dict[str, Any], tokens: Any) -> Callable[[], float]:
    """One step of this package: everything, or adapters over packed experts."""
    import torch

    from gptoss.backends.torch.modules import Transformer
    from gptoss.train.batch import Document, collate
    from gptoss.train.config import TrainConfig
    from gptoss.train.lora import adapt
    from gptoss.train.loss import cross_entropy
    from gptoss.train.optimize import optimizers

    lora = "LoRA" in job["who"]
    config = TrainConfig(recompute=lora or "recomputed" in job["who"])
    dtype = "bfloat16" if lora else "float32"
    model = Transformer.from_checkpoint(job["model"], dtype=dtype, packed=lora)
    if lora:
        adapt(model, rank=8, alpha=16.0)
    [optimizer] = optimizers(model, config)
    row = tokens.tolist()
    [batch] = collate([[Document(row[:-1], row[1:], "random")]])

    def step() -> float:
        optimizer.zero_grad()
        loss = cross_entropy(model, batch, config)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step


def resident() -> int:
    """Bytes of this process that are in memory now."""
    status = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) << 10 for row in status.splitlines() if "VmRSS" in row)


def table(figures: dict[str, dict[str, float]]) -> str:
    """One row for each."""
    base = next(iter(figures.values()))
    rows = ["| | tokens/s | of a step, GB | peak GB | loss |", "|---|---|---|---|---|"]
    for name, found in figures.items():
        speed = found["tokens_per_second"] / base["tokens_per_second"]
        room = found["step_bytes"] / base["step_bytes"]
        rows.append(
            f"| {name} | {found['tokens_per_second']:.1f} ({speed:.2f}x) "
            f"| {found['step_bytes'] / 1e9:.2f} ({room:.2f}x) | {found['peak_bytes'] / 1e9:.2f} "
            f"| {found['first_loss']:.6f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
    else:
        main()
