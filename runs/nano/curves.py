"""How a nano model was trained, as one picture: loss, exact answers, rewards, by step.

    python -m runs.nano.curves docs/nano.svg --runs checkpoints/nano-run --reward nano-reward

Runs that went on from one another follow each other on the axis.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

SMOOTH = 0.9  # of the loss, per row


def rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def picture(runs: list[Path], reward: Path | None, target: Path) -> None:
    """Draw and write."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    losses, exact, rewards = figure.subplots(1, 3)
    first, level = 0, None
    lines: list[tuple[int, float]] = []
    shares: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        for row in rows(run / "metrics.jsonl"):
            loss = row.get("cross_entropy", row["loss"])  # without the router's balance
            level = loss if level is None else SMOOTH * level + (1 - SMOOTH) * loss
            lines.append((first + row["step"], level))
        for row in rows(run / "exact.jsonl"):
            for task, share in row["exact"].items():
                shares.setdefault(task, []).append((first + row["step"], 100 * share))
        first = lines[-1][0]
    losses.semilogy(*zip(*lines[:: max(1, len(lines) // 200)], strict=True), linewidth=1)
    losses.set(title="loss", xlabel="step")
    for task, points in shares.items():
        exact.plot(*zip(*points, strict=True), linewidth=1, label=task)
    exact.set(title="whole turns, held out, %", xlabel="step")
    exact.legend(fontsize=6, ncols=2)
    if reward is not None:
        found = [(row["step"], row["reward"]) for row in rows(reward / "metrics.jsonl")]
        rewards.plot(*zip(*found, strict=True), linewidth=1)
    rewards.set(title="mean reward", xlabel="round")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nano"}):
        figure.savefig(target, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--reward", type=Path)
    args = parser.parse_args()
    picture(args.runs, args.reward, args.target)
