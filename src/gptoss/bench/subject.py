"""What is measured: a loaded model, its rows, and how rounds alternate with the roofline."""

import time
from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

import numpy as np

from gptoss.backends.protocol import Backend, Batch, Logits
from gptoss.bench.cost import Cost, Widths, cost, widths
from gptoss.bench.roofline import Roofline
from gptoss.checkpoint.open import LAYOUTS, open_checkpoint
from gptoss.engine import GREEDY
from gptoss.errors import CacheMiss
from gptoss.llm.models import resolve
from gptoss.llm.plan import Plan
from gptoss.llm.tokens import Announce, Progress, TokenGenerator
from gptoss.model.config import ModelConfig
from gptoss.model.ops import Array


class Loading(TypedDict, total=False):
    """How to load; see ``TokenGenerator``."""

    backend: str
    dtype: str | None
    device: str | None
    precision: str | None
    threads: int | None
    kv: str | None
    memory: int | None
    force: bool
    announce: Announce | None


class Subject:
    """A loaded model. Its prompts are random tokens, the same every time."""

    def __init__(
        self,
        model: str,
        rows: int,
        length: int,
        *,
        progress: Progress | None = None,
        **loading: Unpack[Loading],
    ) -> None:
        """Load it with room for ``rows`` rows of ``length`` tokens.

        Raises:
            ValueError: longer than the model's context, and as ``TokenGenerator``.
        """
        context = open_checkpoint(resolve(model)).config.context_length
        if length > context:
            raise ValueError(
                f"{length} tokens in a row are more than the model's context of {context}"
            )
        room = min(rows * length, context)
        loaded = TokenGenerator(model, max_tokens=room, progress=progress, **loading)
        self.model, self.plan = model, loaded.plan
        self.config: ModelConfig = loaded.config
        self.backend: Backend = loaded.engine.backend
        self.vocabulary, self.step_tokens = loaded.engine.vocab_size, loaded.engine.step_tokens
        self.held: Widths = held(self.plan, self.config)
        self.rows, self.room = rows, rows * length

    def prompts(self, length: int) -> list[list[int]]:
        """For every row its own."""
        drawn = np.random.default_rng(0).integers(0, self.vocabulary, (self.rows, length))
        return [[int(token) for token in row] for row in drawn]

    def draw(self, logits: Logits) -> list[int]:
        """The likeliest token of each row; the device is done when it is known."""
        rows = logits[:, : self.vocabulary]
        return self.backend.sample(rows, [GREEDY] * len(rows), [0.0] * len(rows))

    def cost(self, batch: Batch, visited: Sequence[float]) -> Cost:
        """Of one forward pass."""
        return cost(self.config, self.held, batch, visited)


class Rows:
    """Prompts in the cache of a subject."""

    def __init__(self, subject: Subject, prompts: list[list[int]]) -> None:
        """Nothing is computed yet; ``fill`` computes."""
        self.subject, self.prompts = subject, prompts
        self.cache = subject.backend.new_cache(max_tokens=subject.room)
        self.slots = [self.cache.open() for _ in prompts]

    def fill(self, see: Callable[[Batch, list[int]], None] | None = None) -> list[int]:
        """Read all prompts anew, as the engine would, and draw a token for each.

        ``see`` is given every batch and how many experts it visits in each layer.
        """
        drawn = []
        for slot, prompt in zip(self.slots, self.prompts, strict=True):
            self.cache.truncate(slot, 0)
            for start in range(0, len(prompt), self.subject.step_tokens):
                chunk = prompt[start : start + self.subject.step_tokens]
                stop = start + len(chunk)
                wanted = [] if stop < len(prompt) else [len(chunk) - 1]
                self.cache.reserve(slot, stop)
                batch = Batch.of([chunk], [start], [slot], wanted)
                logits = self._forward(batch, see)
            drawn += self.subject.draw(logits)
        return drawn

    def rewind(self) -> None:
        """Back to the ends of the prompts, which are read anew where the cache has forgotten."""
        try:
            for slot, prompt in zip(self.slots, self.prompts, strict=True):
                self.cache.truncate(slot, len(prompt))
        except CacheMiss:
            self.fill()

    def step(
        self,
        tokens: list[int],
        place: int,
        see: Callable[[Batch, list[int]], None] | None = None,
    ) -> list[int]:
        """A token for each row, at ``place`` in it, and the token drawn after it."""
        for slot in self.slots:
            self.cache.reserve(slot, place + 1)
        batch = Batch.of([[t] for t in tokens], [place] * len(tokens), self.slots)
        return self.subject.draw(self._forward(batch, see))

    def _forward(self, batch: Batch, see: Callable[[Batch, list[int]], None] | None) -> Logits:
        if see is None:
            return self.subject.backend.forward(batch, self.cache)
        visited = []

        def trace(name: str, x: Array) -> None:
            if name.endswith(".mlp.chosen"):
                visited.append(len({e for chosen in x.tolist() for e in chosen}))

        logits = self.subject.backend.forward(batch, self.cache, trace)
        see(batch, visited)
        return logits


def held(plan: Plan, config: ModelConfig) -> Widths:
    """At what widths the plan's backend holds the model."""
    numbers = plan.dtype or plan.precision
    assert numbers is not None
    packed = LAYOUTS[plan.layout].packed
    return widths(
        config, plan.backend, numbers, packed=packed, kv=plan.kv, precision=plan.precision
    )


def alternate(
    work: Callable[[], float], rounds: int, watch: Progress | None
) -> tuple[list[float], Roofline]:
    """Seconds of each round of ``work``, with the roofline measured before, between and after."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    roofline, seconds = Roofline(), []
    roofline.measure()
    for done in range(rounds):
        seconds.append(work())
        roofline.measure()
        if watch is not None:
            watch(done + 1, rounds)
    return seconds, roofline


def clock(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
