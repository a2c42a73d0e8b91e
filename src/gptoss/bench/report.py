"""What a benchmark found, for people and as one JSON line."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from gptoss.bench.cost import Cost
from gptoss.bench.machine import describe
from gptoss.bench.roofline import Roofline
from gptoss.llm.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Report:
    """Some rounds of the same work, and what the machine could do meanwhile."""

    benchmark: str  # decode, prefill, load
    model: str  # as asked for
    plan: Plan
    settings: dict[str, int]
    tokens: int  # of one round
    cost: Cost  # of one round
    seconds: list[float]  # of each round
    roofline: Roofline
    peak_memory: int | None  # bytes
    more: dict[str, Any] = field(default_factory=dict)  # what only this benchmark knows

    @property
    def rates(self) -> list[float]:
        """Tokens in a second, round by round."""
        return [self.tokens / s for s in self.seconds]

    @property
    def typical(self) -> float:
        """Seconds of the median round."""
        return median(self.seconds)

    @property
    def peak(self) -> tuple[str, str | None, float | None]:
        """(arithmetic, instruction set, operations in a second) that this work could reach.

        Of native's exact precision, float32 outside the experts; packed experts take 8-bit
        integers, two multiplications for one.
        """
        isa, floats = self.roofline.peak("float32") or (None, None)
        name, bytes_ = self.roofline.peak("int8") or (None, None)
        if bytes_ is None or self.plan.precision is None:
            return "float32", isa, floats
        if self.plan.precision == "fast" and self.plan.integers:
            return "int8", name, bytes_
        if floats is None or not self.plan.integers:
            return "float32", isa, floats
        done, inside = self.cost.operations, self.cost.experts
        seconds = (done - inside) / floats + inside / (bytes_ / 2)
        return "float32 and, for experts, int8 twice", name, done / seconds

    def to_json(self) -> dict[str, Any]:
        """Everything; bytes and seconds, never rounded."""
        plan, roof = self.plan, self.roofline
        on_cpu = plan.device == "cpu"  # the roofline is the processor's
        arithmetic, isa, peak = self.peak
        moved, done = self.cost.bytes / self.typical, self.cost.operations / self.typical
        return {
            "benchmark": self.benchmark,
            "model": self.model,
            "layout": plan.layout,
            "backend": plan.backend,
            "dtype": plan.dtype,
            "precision": plan.precision,
            "threads": plan.threads,
            "kv": plan.kv,
            "device": plan.device,
            **self.settings,
            "tokens_per_second": self.tokens / self.typical,
            "tokens_per_second_min": min(self.rates),
            "tokens_per_second_max": max(self.rates),
            "seconds": self.seconds,
            "bytes_per_token": self.cost.bytes / self.tokens,
            "operations_per_token": self.cost.operations / self.tokens,
            "bytes_per_second": moved,
            "operations_per_second": done,
            "read_bandwidth": roof.bandwidth,
            "read_bandwidths": roof.bandwidths,
            "share_of_bandwidth": moved / roof.bandwidth if on_cpu else None,
            "arithmetic": arithmetic,
            "instruction_set": isa,
            "peak_operations": peak,
            "share_of_peak": done / peak if on_cpu and peak else None,
            "peaks": roof.peaks,
            "roofline": roof.source,
            "peak_memory_bytes": self.peak_memory,
            **self.more,
            **describe(),
        }


def table(facts: dict[str, Any]) -> str:
    """The same for people, from the facts of ``Report.to_json``."""
    f, machine = facts, facts["machine"]
    numbers = f["dtype"] or f"{f['precision']} precision"
    threads = "" if f["threads"] is None else f", threads {f['threads']}"
    names = ("rows", "context", "steps", "tokens", "rounds")
    settings = ", ".join(f"{name} {f[name]}" for name in names if name in f)
    versions = ", ".join(f"{name} {v}" for name, v in f["versions"].items())
    memory, of = machine["memory_bytes"], "in all" if f["benchmark"] == "load" else "a token"
    lines = [
        f"{f['benchmark']} of {f['model']} ({f['layout']} layout): {f['backend']} backend, "
        f"{numbers}, {f['device']}{threads}; {settings}",
        f"tokens/s     {f['tokens_per_second']:.4g} "
        f"(from {f['tokens_per_second_min']:.4g} to {f['tokens_per_second_max']:.4g})",
        "bytes        "
        f"{metric(f['bytes_per_token'], 'B')} {of}, {metric(f['bytes_per_second'], 'B')}/s"
        + share(f["share_of_bandwidth"], f"{metric(f['read_bandwidth'], 'B')}/s"),
        "operations   "
        f"{metric(f['operations_per_token'], 'op')} {of}, "
        f"{metric(f['operations_per_second'], 'op')}/s"
        + share(
            f["share_of_peak"], f"{metric(f['peak_operations'] or 0, 'op')}/s of {f['arithmetic']}"
        ),
        f"memory       {_known(f['peak_memory_bytes'])} at most",
        f"machine      {machine['cpu']}, {machine['cores']} cores, {_known(memory)}; "
        f"{machine['system']}",
        f"versions     {versions}, commit {f['commit'] or 'unknown'}",
    ]
    if f["benchmark"] == "load":
        lines[1:2] = [
            f"first token  {f['tokens_per_second'] ** -1:.4g} s (from {min(f['seconds']):.4g} to "
            f"{max(f['seconds']):.4g}); {_known(f['storage_bytes'])} from disk in the first round"
        ]
    if f["roofline"] == "numpy":
        lines.append("the compiled core is absent: NumPy's bandwidth and peak stand in")
    return "\n".join(lines)


def share(part: float | None, whole: str) -> str:
    """Of what the machine does; nothing where that does not apply."""
    return "" if part is None else f": {part:.1%} of {whole}"


def metric(n: float, unit: str) -> str:
    """Four digits for people."""
    for prefix in ("", "k", "M"):
        if n < 1000:
            return f"{n:.4g} {prefix}{unit}"
        n /= 1000
    return f"{n:.4g} G{unit}"


def _known(n: int | None) -> str:
    return "unknown" if n is None else metric(n, "B")
