"""Tokens a second, memory and errors of mlx-lm and of this package's mlx backend, turn by turn.

    python benchmarks/vs_mlx_lm.py --model ~/gpt-oss-20b                  # on a Mac: the GPU
    python benchmarks/vs_mlx_lm.py --vocabulary 32768 --prefill 32 --prompt 8 --decode 8   # Linux

Without ``--model``, a random checkpoint of a few layers of 20b's widths is written first, in the
published layout, and read by both. mlx-lm is installed into a virtual environment of its own. In
every round each contender loads the model in a process of its own, reads random tokens once
untimed, and is timed: prompts, then tokens one by one after a short prompt. All feed the same
tokens and fetch the logits of the last one; none draws from them.

Then both read 4,200 tokens of a small model with 20b's window and YaRN, written in mlx-lm's layout,
and the logits are compared with the reference's in float64, by place in the text.

Prints two tables and ends with one JSON line, also written to ``--out``.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vs_llamacpp import ROOT, STEADY, Feed, Job, asked, cores, finish, measured, middle, peak, table

HERE = Path(__file__).resolve()
OURS_PYTHON = Path(sys.executable)
VERSION = "0.32.2"
THEIRS: dict[str, dict[str, Any]] = {
    "mlx-lm bfloat16": {"engine": "mlx_lm", "dtype": "bfloat16"},
    "mlx-lm float32": {"engine": "mlx_lm", "dtype": "float32"},
}
OURS_MLX = {"engine": "ours", "backend": "mlx"}
OURS: dict[str, dict[str, Any]] = {
    "gptoss bfloat16": OURS_MLX | {"dtype": "bfloat16", "precision": "exact"},
    "gptoss float32": OURS_MLX | {"dtype": "float32", "precision": "exact"},
    "gptoss 8-bit": OURS_MLX | {"dtype": "bfloat16", "precision": "fast"},
}
STEP = 256  # of a prompt, tokens computed together, for both
LENGTH = 4200
PLACES = {"0 to 127": (0, 128), "128 to 4,095": (128, 4096), "4,096 to 4,199": (4096, LENGTH)}


def main() -> None:
    """Prepare, measure, compare, report."""
    args = arguments()
    args.scratch.mkdir(parents=True, exist_ok=True)
    python = built(args.venv or args.scratch / "venv")
    model = args.model or written(
        args.scratch / f"20b-{args.layers}-{args.vocabulary}",
        {"layers": args.layers, "vocabulary": args.vocabulary, "layout": "huggingface"},
    )
    room = max(*args.prefill, args.prompt + STEADY + args.decode)
    sizes = {"prefill": args.prefill, "prompt": args.prompt, "decode": args.decode}
    common = {"model": str(model), "room": room, "vocabulary": 1000, **sizes}
    names = [n for n in THEIRS | OURS if not args.only or any(part in n for part in args.only)]
    theirs = [name for name in names if name in THEIRS]
    where = {name: python if name in THEIRS else OURS_PYTHON for name in names}
    jobs = {name: (THEIRS | OURS)[name] | common for name in names}
    rounds = []
    for number in range(args.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        found = {name: asked(where[name], jobs[name], name, HERE) for name in order}
        rounds.append({name: found[name] for name in names})
    figures = {name: middle([r[name] for r in rounds]) for name in names}
    print(table(figures, [*(f"prefill {n}" for n in args.prefill), "decode"], theirs))
    found = errors({name: where[name] for name in names if "8-bit" not in name}, args.scratch)
    print("\n" + by_place(found))
    finish(
        args.out or ROOT / "benchmarks" / "results" / f"vs_mlx_lm-{machine()}.json",
        {
            "benchmark": "vs_mlx_lm",
            "model": str(args.model or f"20b of {args.layers} layers, {args.vocabulary} tokens"),
            **sizes,
            "rounds": args.rounds,
            "threads": cores(),
            "medians": figures,
            "relative_errors": found,
            "each_round": rounds,
        },
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint's directory; else a random one")
    parser.add_argument("--layers", type=int, default=2, help="of the random checkpoint")
    parser.add_argument("--vocabulary", type=int, default=201_088, help="of the random checkpoint")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "vs_mlx_lm")
    parser.add_argument("--venv", type=Path, help="mlx-lm's; by default in the scratch folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the decoded ones")
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="contenders whose names contain one of these")
    parser.add_argument("--out", type=Path, help="by default in results, named after the machine")
    return parser.parse_args()


def machine() -> str:
    """System and processor, as a file's name has it."""
    from gptoss.bench.machine import cpu

    said = f"{platform.system()} {platform.machine()} {cpu()}".lower()
    return re.sub(r"[^a-z0-9_]+", "-", said).strip("-")


# Preparation


def built(folder: Path) -> Path:
    """The interpreter of a virtual environment that has mlx-lm, made if there is none."""
    python = folder / "bin" / "python"
    probe = [str(python), "-c", "import mlx_lm"]
    if not python.exists() or subprocess.run(probe, capture_output=True).returncode:
        venv.create(folder, with_pip=True)
        wheel = "mlx" if platform.system() == "Darwin" else "mlx[cpu]"
        install = [str(python), "-m", "pip", "install", "--quiet", wheel, f"mlx-lm=={VERSION}"]
        subprocess.run(install, check=True)
    return python


def written(path: Path, job: Job) -> Path:
    """A random checkpoint, written now unless it is there already."""
    if not path.exists():
        job = {"engine": "synthesize", "target": str(path), **job}
        if "error" in asked(OURS_PYTHON, job, path.name, HERE):
            sys.exit(1)
    return path


def config(job: Job) -> Any:
    """Of a random checkpoint: 20b with fewer layers, or a narrow model with its window and YaRN."""
    from gptoss.model.config import gpt_oss_20b

    whole = gpt_oss_20b()
    if "layers" in job:
        return replace(whole, num_hidden_layers=job["layers"], vocab_size=job["vocabulary"])
    narrow = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 1000, "num_experts": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return replace(whole, num_hidden_layers=4, **narrow, **heads)


# Contenders, each in a process of its own


def work(job: Job) -> dict[str, Any]:
    """In the fresh process; mlx-lm's has nothing of this package."""
    started = time.perf_counter()
    if job["engine"] == "synthesize":
        from gptoss.checkpoint.synthesize import synthesize

        synthesize(config(job), job["target"], job["layout"])
        return {"seconds": time.perf_counter() - started}
    feed, system = mlx_lm(job) if job["engine"] == "mlx_lm" else ours(job)
    loaded = time.perf_counter() - started
    if "save" in job:
        import numpy as np

        np.save(job["save"], np.concatenate(feed(tokens_of(LENGTH), 0, every=True)))
        return {}
    rates = measured(feed, job)
    return {**rates, "load_seconds": loaded, "peak_bytes": highest(), "system": system}


def highest() -> int:
    """Most bytes that this process has held."""
    import mlx.core as mx

    return peak() or int(mx.get_peak_memory())


def tokens_of(length: int) -> list[int]:
    """Random ones, the same for all."""
    import random

    drawn = random.Random(1)
    return [drawn.randrange(1000) for _ in range(length)]


def mlx_lm(job: Job) -> tuple[Any, str]:
    """A model in mlx-lm, with its own cache and its own steps through a prompt."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm import __version__
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["model"]))
    if job["dtype"] == "float32":
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    cache = make_prompt_cache(model)

    def feed(tokens: Sequence[int], past: int, every: bool = False) -> list[Any]:
        nonlocal cache
        if past == 0:
            cache = make_prompt_cache(model)
        rows, first = [], len(tokens) if every else len(tokens) - 1
        for start in range(0, first, STEP):
            logits = model(mx.array([tokens[start : min(start + STEP, first)]]), cache=cache)[0]
            if every:
                rows.append(np.array(logits.astype(mx.float32)))
            else:
                mx.eval([c.state for c in cache])  # as it does itself: no logits of a prompt
        if not every:
            logits = model(mx.array([tokens[-1:]]), cache=cache)[0]
            rows.append(np.array(logits.astype(mx.float32)))
        return rows

    return feed, f"mlx-lm {__version__} on {mx.default_device()}"


def ours(job: Job) -> tuple[Feed, str]:
    """A model in this package, in steps as long as its engine's."""
    import mlx.core as mx

    from gptoss.backends import load_backend
    from gptoss.backends.protocol import Batch
    from gptoss.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(job["model"])
    options: dict[str, Any] = {"dtype": job["dtype"]}
    if job["backend"] == "mlx":
        options["device"] = "gpu" if mx.metal.is_available() else "cpu"
        options["precision"] = job["precision"]
    backend = load_backend(job["backend"], checkpoint.config, checkpoint.read, **options)
    checkpoint.release()
    cache = backend.new_cache(max_tokens=max(job["room"], LENGTH))
    slot = cache.open()

    def feed(tokens: Sequence[int], past: int, every: bool = False) -> list[Any]:
        if past == 0:
            cache.truncate(slot, 0)
        rows = []
        for start in range(0, len(tokens), STEP):
            chunk = tokens[start : start + STEP]
            last = [len(chunk) - 1] if start + STEP >= len(tokens) else []
            wanted = range(len(chunk)) if every else last
            batch = Batch.of([chunk], [past + start], [slot], wanted)
            rows.append(backend.to_numpy(backend.forward(batch, cache)))
        return rows

    return feed, f"{job['backend']} {options}"


# Errors


def errors(where: dict[str, Path], scratch: Path) -> dict[str, dict[str, Any]]:
    """Of each contender, the distance from the reference in float64 as a share of the logits."""
    import numpy as np

    model = written(scratch / "small-mlx", {"layout": "mlx"})
    (scratch / "logits").mkdir(exist_ok=True)
    truth: dict[str, dict[str, Any]] = {
        "reference float64": {"engine": "ours", "backend": "reference", "dtype": "float64"}
    }
    found: dict[str, Any] = {}
    for name, how in (truth | {n: (THEIRS | OURS)[n] for n in where}).items():
        save = scratch / "logits" / f"{name}.npy"
        job = how | {"model": str(model), "room": LENGTH, "save": str(save)}
        if "error" not in asked(
            where.get(name, OURS_PYTHON), job, f"{name}, {LENGTH} tokens", HERE
        ):
            found[name] = np.load(save).astype(np.float64)
    exact = found.pop("reference float64")
    away = {
        name: np.linalg.norm(x - exact, axis=1) / np.linalg.norm(exact, axis=1)
        for name, x in found.items()
    }
    same = {name: x.argmax(axis=1) == exact.argmax(axis=1) for name, x in found.items()}
    return {
        name: {
            place: {
                "median": float(np.median(away[name][a:b])),
                "largest": float(away[name][a:b].max()),
                "same_likeliest": float(same[name][a:b].mean()),
            }
            for place, (a, b) in PLACES.items()
        }
        for name in found
    }


def by_place(found: dict[str, dict[str, Any]]) -> str:
    """Median errors, and how often the likeliest token is the reference's."""
    rows = [["error of the logits at", *PLACES], ["---"] * (1 + len(PLACES))]
    for name, places in found.items():
        cells = [f"{x['median']:.1e}, {x['same_likeliest']:.0%} same" for x in places.values()]
        rows.append([name, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
    else:
        main()
