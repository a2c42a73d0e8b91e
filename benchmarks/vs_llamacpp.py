"""Tokens a second of llama.cpp and of this package on one checkpoint, turn by turn.

    python benchmarks/vs_llamacpp.py checkpoints/20b
    python benchmarks/vs_llamacpp.py nano --prefill 64 --decode 8 --rounds 1 --out /tmp/nano.json

Converts the checkpoint to GGUF twice (dense matrices in bfloat16 and in Q8_0) and builds llama.cpp
for this processor from the source package ``llama-cpp-python`` into a virtual environment of its
own, unless both lie in the scratch directory already. Then, in every round, the machine's read
bandwidth is measured and each contender loads the model in a process of its own, which gives all
memory back, reads random tokens once untimed, and is timed: prompts, then tokens one by one after
a short prompt. All feed the same tokens and fetch the logits of the last one; none draws from them.

Prints a table of medians and ends with one JSON line, also written to ``--out``. A 20b takes
26 GB of disk for the two files and wants the machine to itself. ``--agree TEXT`` first shows how
often the likeliest next token is the same one after every token of a text.
"""

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
SPECIFIER = "llama-cpp-python"
FLAGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
STEADY = 4  # tokens decoded before the clock starts

# What is run, by name. llama.cpp repacks weights for the processor where it does not map the file.
LLAMA: dict[str, dict[str, Any]] = {
    "llama.cpp bf16, mapped": {"dense": "bf16", "use_mmap": True, "flash_attn": False},
    "llama.cpp bf16, repacked": {"dense": "bf16", "use_mmap": False, "flash_attn": False},
    "llama.cpp q8_0, mapped": {"dense": "q8_0", "use_mmap": True, "flash_attn": False},
    "llama.cpp q8_0, repacked": {"dense": "q8_0", "use_mmap": False, "flash_attn": False},
    "llama.cpp q8_0, repacked, flash": {"dense": "q8_0", "use_mmap": False, "flash_attn": True},
}
OURS: dict[str, dict[str, Any]] = {
    "gptoss fast": {"backend": "native", "precision": "fast"},
    "gptoss exact": {"backend": "native", "precision": "exact"},
}
TORCH: dict[str, dict[str, Any]] = {"gptoss torch": {"backend": "torch"}}

Feed = Callable[[Sequence[int], int], None]  # new tokens, and how many stand before them
Job = dict[str, Any]


def main() -> None:
    """Prepare, measure, report."""
    args = arguments()
    args.scratch.mkdir(parents=True, exist_ok=True)
    model, vocabulary = named(args.model)
    contenders = LLAMA | (TORCH if args.torch else OURS)
    if args.only:
        whole = set(args.only) & set(contenders)
        parts = set(args.only) - whole
        contenders = {
            n: c for n, c in contenders.items() if n in whole or any(part in n for part in parts)
        }
    kinds = dict.fromkeys(c["dense"] for c in contenders.values() if "dense" in c)
    python = built(args.venv or args.scratch / "venv") if kinds else Path(sys.executable)
    files = {dense: converted(model, dense, args.scratch) for dense in kinds}
    room = max(*args.prefill, args.prompt + STEADY + args.decode)
    sizes = {"prefill": args.prefill, "prompt": args.prompt, "decode": args.decode}
    common = {"threads": args.threads, "room": room, "vocabulary": vocabulary, **sizes}
    jobs = {}
    for name, options in contenders.items():
        how = {"engine": "llamacpp" if name in LLAMA else "ours", **options, **common}
        how["model"] = str(files[options["dense"]]["path"]) if name in LLAMA else model
        jobs[name] = how
    where = {name: python if name in LLAMA else Path(sys.executable) for name in jobs}
    agreement = agree(jobs, where, model, args.agree) if args.agree else {}
    rounds, bandwidths = [], []
    for number in range(args.rounds):
        calibration = asked(Path(sys.executable), {"engine": "calibrate"})
        bandwidths.append(calibration["bandwidth"])
        print(f"round {number + 1}: reads {bandwidths[-1] / 1e9:.1f} GB/s", file=sys.stderr)
        order = list(jobs)[number % len(jobs) :] + list(jobs)[: number % len(jobs)]
        rounds.append({name: asked(where[name], jobs[name], name) for name in order})
    figures = {name: middle([r[name] for r in rounds]) for name in jobs}
    metrics = [*(f"prefill {n}" for n in args.prefill), "decode"]
    print(table(figures, metrics, [n for n in figures if n in LLAMA]))
    finish(
        args.out,
        {
            "benchmark": "vs_llamacpp",
            "model": args.model,
            "threads": args.threads,
            **sizes,
            "rounds": args.rounds,
            "flags": FLAGS,
            "files": {d: {k: v for k, v in f.items() if k != "path"} for d, f in files.items()},
            "read_bandwidths": bandwidths,
            "agreement": agreement,
            "medians": figures,
            "each_round": rounds,
        },
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help='a checkpoint\'s path, a Hugging Face id, or "nano"')
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "vs_llamacpp")
    parser.add_argument("--venv", type=Path, help="llama.cpp's; by default in the scratch folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the decoded ones")
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="contenders whose names contain one of these")
    parser.add_argument("--torch", action="store_true", help="the torch backend stands for ours")
    parser.add_argument("--agree", metavar="TEXT", help="a text, special tokens spelled out")
    results = ROOT / "benchmarks" / "results" / "vs_llamacpp.json"
    parser.add_argument("--out", type=Path, default=results)
    return parser.parse_args()


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Preparation


def built(folder: Path) -> Path:
    """The interpreter of a virtual environment that has llama.cpp, made if there is none."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    probe = [str(python), "-c", "import llama_cpp"]
    if python.exists() and subprocess.run(probe, capture_output=True).returncode == 0:
        return python
    print(f"building llama.cpp into {folder}; this takes minutes", file=sys.stderr)
    venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--no-binary", SPECIFIER, SPECIFIER]
    subprocess.run(command, check=True, env=os.environ | {"CMAKE_ARGS": FLAGS})
    return python


def named(model: str) -> tuple[str, int]:
    """The checkpoint's path, and how many ids a prompt may use."""
    from gptoss.checkpoint.open import open_checkpoint
    from gptoss.llm.models import resolve
    from gptoss.llm.tokens import load_tokenizer, sampled_size

    checkpoint = open_checkpoint(resolve(model))
    return str(checkpoint.path), sampled_size(load_tokenizer(checkpoint))


def converted(model: str, dense: str, scratch: Path) -> dict[str, Any]:
    """The GGUF of a checkpoint, written now unless it is there already."""
    path = scratch / f"{Path(model).resolve().name}-{dense}.gguf"
    found: dict[str, Any] = {"path": path}
    if path.exists():
        print(f"{path}: taken as it is; remove it if the checkpoint has changed", file=sys.stderr)
    else:
        job = {"engine": "convert", "model": model, "target": str(path), "dense": dense}
        found |= asked(Path(sys.executable), job, f"convert {dense}")
        if "error" in found:
            sys.exit(1)
    return found | {"bytes": path.stat().st_size}


# Contenders, each in a process of its own


def asked(python: Path, job: Job, name: str = "", script: Path = HERE) -> dict[str, Any]:
    """What a fresh process answers; one that fails says why on stderr, and counts as an error."""
    command = [str(python), str(script), "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        print(f"{name}: failed ({done.returncode}): {said}", file=sys.stderr)
        return {"error": said, "status": done.returncode}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if name:
        rates = {k: round(v, 2) for k, v in answer.items() if k.startswith(("prefill", "decode"))}
        print(f"{name}: {rates or answer}", file=sys.stderr)
    return answer


def work(job: Job) -> dict[str, Any]:
    """In the fresh process. llama.cpp's has neither this package nor its libraries."""
    started = time.perf_counter()
    match job["engine"]:
        case "calibrate":
            from gptoss.bench.roofline import Roofline

            roofline = Roofline()
            roofline.measure()
            return {"bandwidth": roofline.bandwidth}
        case "convert":
            from gptoss.checkpoint.gguf import write_gguf

            write_gguf(job["model"], job["target"], dense=job["dense"])
            return {"seconds": time.perf_counter() - started, "peak_bytes": peak()}
        case "llamacpp":
            feed, extra = llamacpp(job)
        case "ours":
            feed, extra = ours(job)
    loaded = time.perf_counter() - started
    if "tokens" in job:
        return {"likeliest": extra["likeliest"](job["tokens"])}
    rates = measured(feed, job)
    return {**rates, "load_seconds": loaded, "peak_bytes": peak(), "system": extra["system"]}


def llamacpp(job: Job) -> tuple[Feed, dict[str, Any]]:
    """A model in llama.cpp."""
    import llama_cpp

    every = "tokens" in job
    model = llama_cpp.Llama(
        job["model"],
        n_ctx=job["room"],
        n_batch=512,
        n_ubatch=512,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        use_mmap=job["use_mmap"],
        flash_attn=job["flash_attn"],
        logits_all=every,
        verbose=False,
    )

    def feed(tokens: Sequence[int], past: int) -> None:
        model.n_tokens = past  # what stands after it is forgotten
        model.eval(tokens)
        llama_cpp.llama_get_logits(model._ctx.ctx)

    def likeliest(tokens: Sequence[int]) -> list[int]:
        feed(tokens, 0)
        return [int(row.argmax()) for row in model.scores[: len(tokens)]]

    system = llama_cpp.llama_print_system_info().decode()
    said = f"llama-cpp-python {llama_cpp.__version__}; {system}"
    return feed, {"likeliest": likeliest, "system": said}


def ours(job: Job) -> tuple[Feed, dict[str, Any]]:
    """A model in this package, in steps as long as its engine's."""
    from gptoss.backends.protocol import Batch
    from gptoss.llm.tokens import TokenGenerator

    options = {k: job[k] for k in ("backend", "precision") if k in job}
    if job["backend"] == "native":
        options["threads"] = job["threads"]
    else:
        importlib.import_module("torch").set_num_threads(job["threads"])
    model = TokenGenerator(job["model"], max_tokens=job["room"], force=True, **options)
    backend, step = model.engine.backend, model.engine.step_tokens
    cache = backend.new_cache(max_tokens=job["room"])
    slot = cache.open()

    def feed(tokens: Sequence[int], past: int) -> None:
        if past == 0:
            cache.truncate(slot, 0)
        for start in range(0, len(tokens), step):
            chunk = tokens[start : start + step]
            wanted = [len(chunk) - 1] if start + step >= len(tokens) else []
            cache.reserve(slot, past + start + len(chunk))
            batch = Batch.of([chunk], [past + start], [slot], wanted)
            backend.to_numpy(backend.forward(batch, cache))

    def likeliest(tokens: Sequence[int]) -> list[int]:
        return [int(row.argmax()) for row in model.logits(tokens)]

    return feed, {"likeliest": likeliest, "system": str(model.plan).splitlines()[0]}


def measured(feed: Feed, job: Job) -> dict[str, float]:
    """Tokens a second of prompts and of tokens one by one."""
    drawn = random.Random(0)
    tokens = [drawn.randrange(job["vocabulary"]) for _ in range(job["room"])]
    feed(tokens, 0)
    rates = {}
    for n in job["prefill"]:
        started = time.perf_counter()
        feed(tokens[:n], 0)
        rates[f"prefill {n}"] = n / (time.perf_counter() - started)
    first = job["prompt"] + STEADY
    feed(tokens[: job["prompt"]], 0)
    for i in range(job["prompt"], first):
        feed(tokens[i : i + 1], i)
    started = time.perf_counter()
    for i in range(first, first + job["decode"]):
        feed(tokens[i : i + 1], i)
    rates["decode"] = job["decode"] / (time.perf_counter() - started)
    return rates


def peak() -> int | None:
    """Most bytes that this process has had in memory, mapped files included. None: unknown."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(row.split()[1]) << 10 for row in status.splitlines() if "VmHWM" in row)


def agree(
    jobs: dict[str, Job], where: dict[str, Path], model: str, text: str
) -> dict[str, float | None]:
    """The share of a text's tokens after which a contender's likeliest token is the reference's."""
    from gptoss.checkpoint.open import open_checkpoint
    from gptoss.llm.tokens import load_tokenizer

    tokens = load_tokenizer(open_checkpoint(model)).encode_with_specials(text)
    more = {"tokens": tokens, "room": len(tokens)}
    judge = next((name for name in reversed(jobs) if name not in LLAMA), None)
    if judge is None:
        sys.exit("--agree needs one of ours")
    shares: dict[str, float | None] = {}
    right = asked(where[judge], jobs[judge] | more).get("likeliest")
    for name in jobs:
        found = asked(where[name], jobs[name] | more).get("likeliest")
        if found is None or right is None:
            shares[name] = None
            continue
        same = sum(a == b for a, b in zip(found, right, strict=True))
        shares[name] = same / len(tokens)
        print(f"{name}: {same} of {len(tokens)} tokens as {judge}", file=sys.stderr)
    return shares


# Report


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what the rounds that did not fail found."""
    good = [run for run in runs if "error" not in run]
    if not good:
        return runs[0]
    numbers = [k for k, v in good[0].items() if isinstance(v, int | float)]
    rest = {k: v for k, v in good[0].items() if k not in numbers}
    return {k: median(run[k] for run in good) for k in numbers} | rest


def table(figures: dict[str, dict[str, Any]], metrics: list[str], others: list[str]) -> str:
    """Medians, and each as a share of the best among ``others``."""
    best = {
        m: max((figures[name][m] for name in others if m in figures[name]), default=None)
        for m in metrics
    }
    heads = [f"{m} tokens/s" for m in metrics]
    rows = [["", *heads, "load s", "peak GB"], ["---"] * (len(metrics) + 3)]
    for name, found in figures.items():
        if "error" in found:
            rows.append([name, f"failed: {found['error'][:60]}", *[""] * (len(metrics) + 1)])
            continue
        cells = [
            f"{found[m]:.2f}" + (f" ({found[m] / best[m]:.2f}x)" if best[m] else "")
            for m in metrics
        ]
        peak = found["peak_bytes"]
        rows.append([name, *cells, f"{found['load_seconds']:.1f}", f"{(peak or 0) / 1e9:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def finish(out: Path, facts: dict[str, Any]) -> None:
    """Add what a figure is worthless without, write the file, print the line."""
    from gptoss.bench.machine import describe

    facts |= {"date": datetime.now(UTC).date().isoformat(), **describe()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in facts.items() if k != "each_round"}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
    else:
        main()
