"""What became of requests to a server: percentiles of waiting, and what failed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from gptoss.bench.machine import describe

PERCENTILES = (50, 90, 99)
TIMES = {  # by key of the facts: what a person calls it
    "ttft": "first text",
    "inter_token": "between tokens",
    "end_to_end": "whole answer",
}


@dataclass(slots=True)
class Outcome:
    """One request; times are seconds of the same clock."""

    due: float  # when it should be sent
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each chunk with text
    end: float = 0.0
    prompt: int | None = None  # tokens, by the server's usage
    completion: int | None = None
    failure: str | None = None  # its kind; None: a complete answer

    @property
    def tokens(self) -> int:
        """Of the answer: the server's count, else chunks with text."""
        return len(self.arrivals) if self.completion is None else self.completion

    @property
    def gap(self) -> float | None:
        """Seconds between two tokens on average, if there were two; chunks may hold several."""
        if self.tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)


def summary(
    benchmark: str,
    about: dict[str, Any],
    outcomes: Sequence[Outcome],
    seconds: float,
    burnt: float,
) -> dict[str, Any]:
    """Everything, in seconds and tokens, for one JSON line.

    Waiting counts from when a request was due, so that a late generator hides nothing; failed ones
    count among the failures only. ``burnt`` is what the generator itself took of the processor.
    """
    whole = [o for o in outcomes if o.failure is None]
    counted = {o.completion is not None for o in whole}
    tokens = sum(o.tokens for o in whole)
    waits = {
        "ttft": [o.arrivals[0] - o.due for o in whole],
        "inter_token": [o.gap for o in whole if o.gap is not None],
        "stall": [max(b - a for a, b in pairwise(o.arrivals)) for o in whole if o.arrivals[1:]],
        "end_to_end": [o.end - o.due for o in whole],
    }
    return {
        "benchmark": benchmark,
        **about,
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(whole) / seconds,
        "seconds": seconds,
        "completed": len(whole),
        "failures": dict(Counter(o.failure for o in outcomes if o.failure is not None)),
        "prompt_tokens": sum(o.prompt for o in whole if o.prompt is not None) or None,
        "completion_tokens": tokens,
        "counted_by": "usage" if counted == {True} else "both" if True in counted else "chunks",
        **{name: percentiles(values) for name, values in waits.items()},
        "late": percentiles([o.sent - o.due for o in outcomes]),
        "generator_cpu": burnt / seconds,
        **describe(),
    }


def percentiles(values: Sequence[float | None]) -> dict[str, float] | None:
    """By name, p50 and so on; None of nothing."""
    if not values:
        return None
    found = np.percentile(np.array(values, np.float64), PERCENTILES)
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def table(facts: dict[str, Any]) -> str:
    """The same for people."""
    f = facts
    load = f"{f['rate']:g} requests/s" if f["rate"] else f"{f['clients']} clients"
    failed = ", ".join(f"{n} {kind}" for kind, n in f["failures"].items()) or "none"
    head = " " * 16 + "".join(f"p{p}".rjust(12) for p in PERCENTILES)
    return "\n".join(
        [
            f"serve of {f['model']} at {f['url']} ({f['api']}), {f['loop']} loop, {load}",
            f"answers         {f['completed']} of {f['requests']}, failures: {failed}",
            f"tokens/s        {f['tokens_per_second']:.4g} "
            f"({f['completion_tokens']} tokens by {f['counted_by']}, "
            f"{f['requests_per_second']:.4g} answers/s, {f['seconds']:.4g} s)",
            head,
            *(_row(name, f[key]) for key, name in TIMES.items()),
            _row("longest stall", f["stall"]),
            _row("sent late by", f["late"]),
            f"generator       {f['generator_cpu']:.1%} of one core",
        ]
    )


def _row(name: str, values: dict[str, float] | None) -> str:
    shown = ["-"] * len(PERCENTILES) if values is None else [_time(v) for v in values.values()]
    return name.ljust(16) + "".join(cell.rjust(12) for cell in shown)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds < 10 else f"{seconds:.4g} s"
