"""A training step with everything in memory, and with what is not at work in files: memory, time.

    python benchmarks/train_offload.py                                # 327 million parameters
    python benchmarks/train_offload.py --layers 4 --steps 2 --rounds 1 --out /tmp/small.json

All train the same random weights in float32 with AdamW on the same tokens, each in a process of its
own, turn by turn; the losses must be the same numbers. ``peak_bytes`` is the most that a process
has had resident, loading included. Files lie in the scratch directory: name one on a real disk.

Prints a table and ends with one JSON line.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from vs_llamacpp import ROOT, asked, cores, finish, peak

HERE = Path(__file__).resolve()
PYTHON = Path(sys.executable)
CONTENDERS: dict[str, dict[str, Any]] = {
    "in memory": {},
    "in memory, recomputed": {"recompute": True},
    "optimizer put away": {"recompute": True, "offload": "optimizer"},
    "parameters put away": {"offload": "parameters"},
}
SHAPE = {
    "num_hidden_layers": 24,
    "hidden_size": 512,
    "intermediate_size": 512,
    "vocab_size": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "experts_per_token": 2,
}


def main() -> None:
    """Write the model, measure by turns, report."""
    args = arguments()
    shape = SHAPE | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        job = {"length": args.length, "steps": args.steps, "threads": args.threads}
        job |= {"model": write(Path(folder) / "model", shape), "folder": folder}
        rounds = [
            {name: asked(PYTHON, job | {"config": how}, name, HERE) for name, how in kinds(args)}
            for _ in range(args.rounds)
        ]
    figures = {
        name: {key: median(each[name][key] for each in rounds) for key in rounds[0][name]}
        for name, _ in kinds(args)
    }
    losses = {figure["last_loss"] for figure in figures.values()}
    assert len(losses) == 1, f"not the same training: {losses}"
    print(table(figures))
    facts = {"benchmark": "train_offload", "model": shape, "length": args.length}
    facts |= {"steps": args.steps, "threads": args.threads, "results": figures}
    finish(args.out or ROOT / "benchmarks" / "results" / "train_offload.json", facts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--length", type=int, default=512, help="tokens of the one sequence")
    parser.add_argument("--steps", type=int, default=4, help="of which all but the first are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--only", choices=CONTENDERS, help="one of them")
    parser.add_argument("--scratch", type=Path, help="where model and files are written")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def kinds(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Who is measured."""
    return [(name, how) for name, how in CONTENDERS.items() if args.only in (None, name)]


def write(path: Path, shape: dict[str, int]) -> str:
    """A random model."""
    from gptoss.checkpoint.synthesize import synthesize
    from gptoss.model.config import gpt_oss_20b

    return str(synthesize(replace(gpt_oss_20b(), **shape), path, "huggingface-bf16"))


def work(job: dict[str, Any]) -> dict[str, float]:
    """In the fresh process: some steps."""
    import torch

    from gptoss.backends.torch.modules import Transformer
    from gptoss.train.batch import Document, collate
    from gptoss.train.config import TrainConfig
    from gptoss.train.loss import cross_entropy
    from gptoss.train.offload import keeper, learner_of, shelf_of

    torch.set_num_threads(job["threads"])
    torch.use_deterministic_algorithms(True)
    config = TrainConfig(**job["config"], offload_dir=job["folder"])
    shelf = shelf_of(config, job["folder"])
    keep = keeper(shelf, "cpu") if config.offload == "parameters" else None
    model = Transformer.from_checkpoint(job["model"], dtype="float32", packed=False, keep=keep)
    learner = learner_of(model, config, job["folder"], shelf)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(8000, (job["length"] + 1,), generator=generator).tolist()
    [batch] = collate([[Document(row[:-1], row[1:], "random")]])
    seconds, losses = [], []
    for _ in range(job["steps"]):
        started = time.perf_counter()
        learner.begin()
        found = learner.learn(batch, lambda b: cross_entropy(model, b, config, learner.layer))
        learner.clip(config.clip)
        learner.update(1.0)
        losses.append(found[0])
        seconds.append(time.perf_counter() - started)
    return {
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "tokens_per_second": job["length"] / median(seconds[1:]),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_bytes": float(peak() or 0),
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """One row for each."""
    base = next(iter(figures.values()))
    rows = ["| | tokens/s | peak GB | loss |", "|---|---|---|---|"]
    for name, found in figures.items():
        speed = found["tokens_per_second"] / base["tokens_per_second"]
        room = found["peak_bytes"] / base["peak_bytes"]
        rows.append(
            f"| {name} | {found['tokens_per_second']:.1f} ({speed:.2f}x) "
            f"| {found['peak_bytes'] / 1e9:.2f} ({room:.2f}x) | {found['last_loss']:.6f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
    else:
        main()
