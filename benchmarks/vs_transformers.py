"""Seconds of transformers and of this package on a few layers of full size, and of all of them.

    python benchmarks/vs_transformers.py --preset 20b --layers 1 4
    python benchmarks/vs_transformers.py --preset nano --layers 1 2 --rounds 1 --out /tmp/nano.json

On a CPU transformers holds every expert in bfloat16, which of a whole 20b fills 42 GB. So random
checkpoints of one layer and of a few are written (the same values for both, packed for us, in
bfloat16 for it) and timed turn by turn as ``vs_llamacpp.py`` says; a line through the times of the
layer counts gives the time of all layers. What is outside the layers, the unembedding above all,
is in the line's beginning, so it is counted once.

Prints a table of tokens a second, measured and extrapolated, and ends with one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from vs_llamacpp import OURS, ROOT, STEADY, TORCH, Feed, Job, asked, cores, finish, measured, peak
from vs_llamacpp import ours as ours_of

HERE = Path(__file__).resolve()
PYTHON = Path(sys.executable)
THEIRS: dict[str, dict[str, Any]] = {"transformers bf16": {"engine": "transformers"}}


def main() -> None:
    """Write the checkpoints, measure, extrapolate, report."""
    args = arguments()
    config = preset(args.preset)
    args.scratch.mkdir(parents=True, exist_ok=True)
    room = max(*args.prefill, args.prompt + STEADY + args.decode)
    sizes = {"prefill": args.prefill, "prompt": args.prompt, "decode": args.decode}
    contenders = THEIRS | {
        name: {"engine": "ours", **how} for name, how in (TORCH if args.torch else OURS).items()
    }
    jobs: dict[tuple[str, int], Job] = {}
    for layers in sorted(set(args.layers)):
        paths = {
            layout: written(args.scratch, args.preset, layers, layout)
            for layout in ("huggingface", "huggingface-bf16")
        }
        for name, how in contenders.items():
            layout = "huggingface-bf16" if name in THEIRS else "huggingface"
            job = {**how, "model": str(paths[layout]), "vocabulary": 900}
            jobs[name, layers] = job | {"threads": args.threads, "room": room, **sizes}
    rounds, bandwidths = [], []
    for number in range(args.rounds):
        bandwidths.append(asked(PYTHON, {"engine": "calibrate"}, script=HERE)["bandwidth"])
        print(f"round {number + 1}: reads {bandwidths[-1] / 1e9:.1f} GB/s", file=sys.stderr)
        order = list(jobs)[number % len(jobs) :] + list(jobs)[: number % len(jobs)]
        found = {key: asked(PYTHON, jobs[key], f"{key[0]}, {key[1]} layers", HERE) for key in order}
        rounds.append(found)
    metrics = {**{f"prefill {n}": n for n in args.prefill}, "decode": 1}
    figures = {name: figure(name, rounds, metrics, config.num_hidden_layers) for name in contenders}
    print(table(figures, list(metrics), config.num_hidden_layers))
    facts = {
        "benchmark": "vs_transformers",
        "preset": args.preset,
        "threads": args.threads,
        "layers": sorted(set(args.layers)),
        "extrapolated_to": config.num_hidden_layers,
        **sizes,
        "rounds": args.rounds,
        "read_bandwidths": bandwidths,
        "results": figures,
        "each_round": [{f"{n}, {k} layers": v for (n, k), v in r.items()} for r in rounds],
    }
    finish(args.out, facts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["20b", "120b", "nano"], default="20b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4], help="two counts or more")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "vs_transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--prefill", type=int, nargs="+", default=[128])
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the decoded ones")
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--torch", action="store_true", help="the torch backend stands for ours")
    results = ROOT / "benchmarks" / "results" / "vs_transformers.json"
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args()
    if len(set(args.layers)) < 2 or min(args.layers) < 1:
        parser.error("--layers must be two different counts or more, at least 1 each")
    return args


def preset(name: str) -> Any:
    """The config."""
    from gptoss.model.config import PRESETS

    return PRESETS[name]()


def written(scratch: Path, name: str, layers: int, layout: str) -> Path:
    """A random checkpoint, written now unless it is there already."""
    path = scratch / f"{name}-{layers}-{layout}"
    if not path.exists():
        job = {"engine": "synthesize", "preset": name, "layers": layers}
        answer = asked(PYTHON, job | {"layout": layout, "target": str(path)}, path.name, HERE)
        if "error" in answer:
            sys.exit(1)
    return path


def work(job: Job) -> dict[str, Any]:
    """In the fresh process."""
    started = time.perf_counter()
    match job["engine"]:
        case "calibrate":
            from gptoss.bench.roofline import Roofline

            roofline = Roofline()
            roofline.measure()
            return {"bandwidth": roofline.bandwidth}
        case "synthesize":
            from gptoss.checkpoint.synthesize import synthesize
            from gptoss.llm.models import resolve

            config = replace(preset(job["preset"]), num_hidden_layers=job["layers"])
            words = resolve("nano") / "tokenizer.json" if job["preset"] == "nano" else None
            synthesize(config, job["target"], job["layout"], tokenizer_path=words)
            return {"seconds": time.perf_counter() - started}
        case "transformers":
            feed, system = transformers(job)
        case "ours":
            feed, extra = ours_of(job)
            system = extra["system"]
    loaded = time.perf_counter() - started
    rates = measured(feed, job)
    return {**rates, "load_seconds": loaded, "peak_bytes": peak(), "system": system}


def transformers(job: Job) -> tuple[Feed, str]:
    """A model in transformers, with its own choices of attention and experts."""
    import torch
    import transformers as library

    torch.set_num_threads(job["threads"])
    library.utils.logging.disable_progress_bar()
    model = library.GptOssForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()
    cache = library.DynamicCache(config=model.config)

    def feed(tokens: Sequence[int], past: int) -> None:
        nonlocal cache
        if past == 0:
            cache = library.DynamicCache(config=model.config)
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.float()

    attention = model.config._attn_implementation
    experts = getattr(model.config, "_experts_implementation", None)
    return feed, f"transformers {library.__version__}, attention {attention}, experts {experts}"


def figure(
    name: str, rounds: list[dict[Any, dict[str, Any]]], metrics: dict[str, int], layers: int
) -> dict[str, Any]:
    """Of one contender: median seconds for each count of layers, the line through them, rates."""
    counts = sorted(k for n, k in rounds[0] if n == name)
    found: dict[str, Any] = {}
    for metric, tokens in metrics.items():
        seconds = {
            k: [tokens / r[name, k][metric] for r in rounds if metric in r[name, k]] for k in counts
        }
        if not all(seconds.values()):
            found["error"] = next(
                r[name, k]["error"] for r in rounds for k in counts if not seconds[k]
            )
            return found
        middle = {k: median(s) for k, s in seconds.items()}
        start, slope = line(list(middle), list(middle.values()))
        found[metric] = {
            "seconds": middle,
            "seconds_outside_layers": start,
            "seconds_a_layer": slope,
            "tokens_per_second": tokens / (start + slope * layers),
        }
    keys = [rounds[0][name, k] for k in counts]
    found["peak_bytes"] = [key["peak_bytes"] for key in keys]
    found["system"] = keys[0]["system"]
    return found


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Beginning and slope of the line nearest to the points."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = over / sum((a - mean_x) ** 2 for a in x)
    return mean_y - slope * mean_x, slope


def table(figures: dict[str, dict[str, Any]], metrics: list[str], layers: int) -> str:
    """Tokens a second of all layers, and each as a multiple of transformers'."""
    base = next(iter(figures.values()))
    rows = [
        ["", *(f"{m} tokens/s, {layers} layers" for m in metrics)],
        ["---"] * (1 + len(metrics)),
    ]
    for name, found in figures.items():
        if "error" in found:
            rows.append([name, f"failed: {found['error'][:60]}", *[""] * (len(metrics) - 1)])
            continue
        cells = []
        for m in metrics:
            rate = found[m]["tokens_per_second"]
            times = f" ({rate / base[m]['tokens_per_second']:.2f}x)" if m in base else ""
            cells.append(f"{rate:.2f}{times}")
        rows.append([name, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
    else:
        main()
