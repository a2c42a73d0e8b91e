"""What Prometheus reads: names after vLLM's, so that its dashboards need one word replaced."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from gptoss.engine.worker import Worker

SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Of one server; counts begin with it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.first = self._histogram("time_to_first_token_seconds", "until the first token", LONG)
        self.between = self._histogram("inter_token_latency_seconds", "between tokens", SHORT)
        self.whole = self._histogram("e2e_request_latency_seconds", "of whole requests", LONG)
        self.ended = self._counter("request_success", "requests that ended so", "finished_reason")
        self.aborted = self._counter("request_aborted", "requests that nobody waited for", None)
        self.answered = self._counter("http_responses", "responses", "status")

    def watch(self, worker: "Worker", room: int) -> None:
        """Tell of the engine, too; ``room``: tokens that its cache holds."""
        self.registry.register(_Engine(worker, room))

    def meter(self) -> "Meter":
        """For one request that begins now."""
        return Meter(self)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"gptoss_{name}", about, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, about: str, label: str | None) -> Counter:
        labels = () if label is None else (label,)
        return Counter(f"gptoss_{name}", about, labels, registry=self.registry)


class Meter:
    """The clock of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self.begun = time.monotonic()
        self.first: float | None = None  # seconds until the first token
        self._metrics, self._last, self._over = metrics, self.begun, False

    def token(self) -> None:
        """One more is there."""
        now = time.monotonic()
        if self.first is None:
            self.first = now - self.begun
            self._metrics.first.observe(self.first)
        else:
            self._metrics.between.observe(now - self._last)
        self._last = now

    def end(self, finish: str) -> None:
        """The request is over; said twice, the first counts."""
        if self._over:
            return
        self._over = True
        self._metrics.whole.observe(time.monotonic() - self.begun)
        if finish == "cancelled":
            self._metrics.aborted.inc()
        else:
            self._metrics.ended.labels(finish).inc()


class _Engine:
    """What the engine counts itself, read when asked."""

    def __init__(self, worker: "Worker", room: int) -> None:
        self.worker, self.room = worker, room

    def collect(self) -> Iterator[Metric]:
        """See ``engine.Stats``."""
        now = self.worker.stats
        yield _gauge("num_requests_running", "sequences that run", now.running)
        yield _gauge("num_requests_waiting", "sequences that wait", now.waiting)
        full = min(1.0, (now.held + now.remembered_tokens) / self.room)  # shared ones count twice
        yield _gauge("kv_cache_usage_perc", "of the cache's tokens, 1 is all", full)
        yield _gauge("prefix_cache_entries", "prefixes remembered", now.remembered)
        yield _count("prompt_tokens", "tokens of prompts", now.prompt)
        yield _count("generation_tokens", "tokens drawn", now.completion)
        yield _count("prefix_cache_queries", "tokens of prompts looked up", now.prompt)
        yield _count("prefix_cache_hits", "of those, found", now.reused)
        yield _count("num_preemptions", "sequences that lost their room", now.preempted)
        yield _count("spec_decode_num_draft_tokens", "tokens guessed", now.drafted)
        yield _count("spec_decode_num_accepted_tokens", "of those, right", now.accepted)
        yield _count("engine_steps", "batches", now.steps)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"gptoss_{name}", about, value=value)


def _count(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"gptoss_{name}", about, value=value)
