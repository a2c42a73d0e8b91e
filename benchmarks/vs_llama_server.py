"""Tokens a second and waiting of llama.cpp's server and of this one, on one checkpoint and machine.

    python benchmarks/vs_llama_server.py checkpoints/mid --server llama.cpp/build/bin/llama-server

llama-server is built by whoever runs this, from llama.cpp's source (that of ``llama-cpp-python``
brings it along) with ``cmake -DGGML_NATIVE=ON`` and nothing else. The checkpoint is converted to
GGUF (Q8_0 outside the experts, as our ``fast`` computes it) unless the file is given. In every
round each server is started, warmed and put under the load of ``gptoss bench serve`` at each number
of clients, the same seeded questions for both, and stopped; whose turn is first alternates. Answers
are of full length (``ignore_eos``) and drawn as each server draws when nothing is asked.

Prints a table of medians and ends with one JSON line, also written to ``--out``.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

from gptoss.bench.machine import describe
from gptoss.bench.serve import Load, Server, first_model, serve

ROOT = Path(__file__).resolve().parents[1]
OURS, THEIRS = "gptoss fast", "llama.cpp q8_0"
KEPT = ("tokens_per_second", "ttft", "inter_token", "stall", "completed", "failures")
KEPT += ("prompt_tokens", "completion_tokens", "seconds", "generator_cpu")
FEWEST = 6  # requests, however few clients
STARTING = 300.0  # seconds a server may take to load


def main() -> None:
    """Measure, report."""
    args = arguments()
    contenders = {OURS: ours(args)}
    if args.server is not None:
        contenders[THEIRS] = theirs(args, args.gguf or converted(args))
    rounds: list[dict[str, dict[str, Any]]] = []
    if args.go_on:
        rounds = json.loads(args.out.read_text(encoding="utf-8"))["each_round"]
    for number in range(len(rounds), len(rounds) + args.rounds):
        names = sorted(contenders, reverse=bool(number % 2))
        rounds.append({name: measured(name, contenders[name], args) for name in names})
    figures = {
        name: {clients: middle([r[name][clients] for r in rounds]) for clients in rounds[0][name]}
        for name in contenders
    }
    print(table(figures))
    facts = {
        "benchmark": "vs_llama_server",
        "model": args.model,
        "threads": args.threads,
        "api": "completions",
        "prompts": args.prompts,
        "answers": args.answers,
        "rounds": len(rounds),
        "commands": {
            name: " ".join([Path(program).name, *words])
            for name, (program, *words) in contenders.items()
        },
        "medians": figures,
        "each_round": rounds,
        "date": datetime.now(UTC).date().isoformat(),
        **describe(),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in facts.items() if k != "each_round"}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help='a checkpoint\'s path, or "nano"')
    parser.add_argument("--server", type=Path, help="llama-server; without it, ours alone")
    parser.add_argument("--gguf", type=Path, help="the same weights; by default, converted now")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--go-on", action="store_true", help="add rounds to those in --out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--each", type=int, default=2, help="requests of each client")
    parser.add_argument("--prompts", type=int, nargs=2, default=[32, 256], help="words")
    parser.add_argument("--answers", type=int, nargs=2, default=[32, 64], help="tokens")
    parser.add_argument("--context", type=int, default=2048, help="room of one conversation")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def ours(args: argparse.Namespace) -> list[str]:
    """The command that serves with this package; {port} is still to be filled in."""
    command = [sys.executable, "-m", "gptoss.cli", "serve", args.model, "--port", "{port}"]
    command += ["--threads", str(args.threads), "--context", str(args.context)]
    return [*command, "--conversations", str(max(args.clients))]


def theirs(args: argparse.Namespace, gguf: Path) -> list[str]:
    """The command that serves with llama.cpp, its weights repacked for the processor."""
    slots = max(args.clients)
    command = [str(args.server), "-m", str(gguf), "--port", "{port}", "-t", str(args.threads)]
    return [*command, "-c", str(args.context * slots), "-np", str(slots), "-lm", "none"]


def converted(args: argparse.Namespace) -> Path:
    """The checkpoint as GGUF, in build/."""
    from gptoss.checkpoint.gguf import write_gguf
    from gptoss.llm.models import resolve

    path = ROOT / "build" / f"{Path(args.model).resolve().name}-q8_0.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_gguf(resolve(args.model), path, dense="q8_0")
    return path


def measured(name: str, command: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Facts by number of clients, from one start of a server to its end."""
    with running(command) as url:
        server = Server(
            url=url, model=first_model(url, None), api="completions", ignore_eos=True, timeout=600
        )
        extent: dict[str, Any] = {"prompt": tuple(args.prompts), "answer": tuple(args.answers)}
        serve(server, Load(requests=2, clients=2, prompt=(8, 8), answer=(8, 8), seed=99))
        found = {}
        for clients in args.clients:
            requests = max(args.each * clients, FEWEST)
            load = Load(requests=requests, clients=clients, seed=clients, **extent)
            facts = serve(server, load)
            found[str(clients)] = {key: facts[key] for key in KEPT}
            rate, wait = facts["tokens_per_second"], facts["ttft"]["p50"]
            print(f"{name}, {clients}: {rate:.1f} tokens/s, {wait:.2f} s", file=sys.stderr)
        return found


@contextmanager
def running(command: list[str]) -> Iterator[str]:
    """The URL of a server that is ready; it is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    filled = [word.format(port=port) for word in command]
    with subprocess.Popen(filled, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            await_health(server, port)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def await_health(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Wait until /health says yes. Raises SystemExit."""
    end = time.monotonic() + STARTING
    while server.poll() is None and time.monotonic() < end:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{server.args}: did not come up")


def middle(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds."""
    told = {"tokens_per_second": median(r["tokens_per_second"] for r in runs)}
    for key in ("ttft", "inter_token"):
        for p in ("p50", "p90"):
            told[f"{key}_{p}"] = median(r[key][p] for r in runs)
    return told


def table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """For people: a row for each number of clients and server."""
    lines = ["clients  server            tokens/s   first text p50      p90   between p50"]
    for clients in next(iter(figures.values())):
        for name, by_clients in figures.items():
            f = by_clients[clients]
            lines.append(
                f"{clients:>7}  {name:<16} {f['tokens_per_second']:9.1f}"
                f" {f['ttft_p50']:14.2f} s {f['ttft_p90']:6.2f} s {f['inter_token_p50']:10.3f} s"
            )
        if len(figures) == 2:
            ratio = [figures[n][clients]["tokens_per_second"] for n in (OURS, THEIRS)]
            lines.append(f"{'':>7}  ratio            {ratio[0] / ratio[1]:9.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
