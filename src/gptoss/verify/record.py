"""What a trace is made of, taken from a backend while it computes for others.

A ``Recorder`` stands in a backend's place and passes everything on. Of each step every value is
reduced as it is shown, so that no step's values are kept beyond it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache as once
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Backend, Batch, Cache, Logits
from gptoss.engine import Engine, Request, Stream
from gptoss.engine.stream import Listener
from gptoss.errors import GptOssError
from gptoss.model.config import ModelConfig
from gptoss.model.reference import NDArray
from gptoss.model.weights import Read
from gptoss.verify.candidate import host
from gptoss.verify.sinks import Keys, sinks_of
from gptoss.verify.trace import Part, TraceFile, joined

CANDIDATES = 10
STEP = 256  # tokens computed together in a replay
ROWS = 32  # of logits that are looked at together
Attend = Callable[[int, NDArray, NDArray], NDArray]  # layer, q, k -> what is kept of them: [T, ...]


class Digest:
    """A ``Trace`` that keeps of each value what a trace file has, and forgets the value."""

    def __init__(self, points: Sequence[str] = (), attend: Attend | None = None) -> None:
        """``points``: whose values are kept, by full name or without ``block.N.``. ``attend``: is
        told each layer's queries and keys.
        """
        self.points, self.attend = set(points), attend
        self.names: list[str] = []
        self._seen = set[str]()
        self._kept: dict[str, list[NDArray]] = {"sketch": []}
        self._whole: dict[str, NDArray] = {}
        self._q: NDArray = None

    def __call__(self, name: str, x: Any) -> None:
        """See ``model.Trace``. A layer that is computed again says everything twice."""
        if name in self._seen:
            return
        x = host(x)
        self._seen.add(name)
        self.names.append(name)
        self._kept["sketch"].append(sketch(x))
        here = name.split(".", 2)[-1]
        if self.points & {name, here}:
            self._whole[f"point/{name}"] = np.array(x)
        match here:
            case "attn.q":
                self._q = x
            case "attn.k" if self.attend is not None:
                layer = int(name.split(".")[1])
                self._kept.setdefault("sink", []).append(self.attend(layer, self._q, x))
            case "mlp.chosen" | "mlp.share":
                self._kept.setdefault(here.removeprefix("mlp."), []).append(np.array(x))

    @property
    def arrays(self) -> dict[str, NDArray]:
        """By name, [T, ...]."""
        kept = {name: np.stack(values, axis=1) for name, values in self._kept.items()}
        return kept | self._whole


class Row:
    """One sequence's trace as it grows."""

    def __init__(self, config: ModelConfig, sinks: list[NDArray]) -> None:
        self.keys: Keys | None = Keys(config, sinks)
        self.parts: list[Part] = []  # that were not taken yet
        self.waiting = 0  # tokens in them
        # Logits behind the last token, and the log of the sum of their exponentials.
        self.expected: tuple[NDArray, float] | None = None

    def add(self, start: int, new: dict[str, NDArray], logits: NDArray) -> None:
        """Tokens from ``start`` on, and the logits [t, V] behind each."""
        ids, logprobs, sums = likeliest(logits)
        before = [self.expected if start else None, *zip(logits[:-1], sums[:-1], strict=True)]
        came = [
            np.nan if b is None else float(b[0][token]) - b[1]
            for b, token in zip(before, new["tokens"], strict=True)
        ]
        new = new | {"came": np.array(came, np.float32), "ids": ids, "logprobs": logprobs}
        self.parts.append((start, new))
        self.waiting += len(logits)
        self.expected = np.array(logits[-1]), float(sums[-1])

    def take(self) -> list[Part]:
        """The parts, which are no longer kept here."""
        parts, self.parts, self.waiting = self.parts, [], 0
        return parts


class Recorder:
    """A ``Backend`` that passes everything on to another, and keeps what it sees of some rows."""

    def __init__(
        self,
        backend: Backend,
        read: Read,
        points: Sequence[str] = (),
        whose: Callable[[Batch], Sequence[Row | None]] | None = None,
    ) -> None:
        """
        Args:
            read: of the checkpoint, for its sinks.
            points: see ``Digest``.
            whose: the trace of each row of a batch, None for those that are not recorded. Without
                it, a row that is computed alone; one that begins anew begins a new trace.
        """
        self.backend, self.config, self.points = backend, backend.config, points
        self.new_cache = backend.new_cache
        self.sample, self.to_numpy = backend.sample, backend.to_numpy
        self.sinks = sinks_of(self.config, read)
        self.whose = whose or self._alone
        self.row = Row(self.config, self.sinks)
        self.prompt: int | None = None  # tokens of it, if the rest is an answer
        self.names: list[str] = []

    def _alone(self, batch: Batch) -> Sequence[Row | None]:
        return [self.row if len(batch.slots) == 1 else None] * len(batch.slots)

    def forward(
        self, batch: Batch, cache: Cache, trace: Callable[[str, Any], None] | None = None
    ) -> Logits:
        """See ``Backend.forward``."""
        rows = self.whose(batch)
        if not any(rows):
            return self.backend.forward(batch, cache, trace)
        places = [slice(*pair) for pair in zip(batch.starts[:-1], batch.starts[1:], strict=True)]

        def attend(layer: int, q: NDArray, k: NDArray) -> NDArray:
            parts = [
                np.full((there.stop - there.start, q.shape[1]), np.nan, np.float32)
                if row is None or row.keys is None
                else row.keys.shares(layer, int(past), q[there], k[there])
                for row, there, past in zip(rows, places, batch.past, strict=True)
            ]
            return np.concatenate(parts)

        digest = Digest(self.points, attend)

        def keep(name: str, x: Any) -> None:
            digest(name, x)
            if trace is not None:
                trace(name, x if name not in ("norm", "logits") else picked(x, batch.wanted))

        every = replace(batch, wanted=np.arange(len(batch.tokens), dtype=np.int32))
        logits = self.backend.forward(every, cache, keep)
        self.names = digest.names
        new, seen = {"tokens": batch.tokens, **digest.arrays}, self.to_numpy(logits)
        for row, there, past in zip(rows, places, batch.past, strict=True):
            if row is not None:
                part = {name: x[there] for name, x in new.items()}
                row.add(int(past), part, seen[there])
        return picked(logits, batch.wanted)

    def trace(self, **about: Any) -> TraceFile:
        """What was kept of the row that is alone; ``about`` goes into the header.

        Raises:
            GptOssError: nothing was.
        """
        if not self.row.parts:
            raise GptOssError("there is nothing to trace: not one token was computed")
        about |= {"config": asdict(self.config), "points": self.names, "prompt": self.prompt}
        return TraceFile(about, joined(self.row.parts))


def record(engine: Engine, recorder: Recorder) -> None:
    """From now on the engine computes through the recorder, every request from its beginning.

    Nothing is guessed ahead, so that a trace holds what was read and no more: the prompt and the
    answer, but for the answer's last token. The trace is the last request's.
    """
    submit = engine.submit

    def plainly(request: Request, listener: Listener | None = None) -> Stream:
        engine.clear()
        recorder.row = Row(recorder.config, recorder.sinks)
        recorder.prompt = len(request.prompt)
        return submit(replace(request, speculate=False), listener)

    engine.backend = recorder
    engine.submit = plainly  # type: ignore[method-assign]


def replay(recorder: Recorder, tokens: Sequence[int]) -> None:
    """Read a text anew, all of it given."""
    cache = recorder.new_cache(max_tokens=len(tokens))
    slot = cache.open()
    for past in range(0, len(tokens), STEP):
        some = list(tokens[past : past + STEP])
        cache.reserve(slot, past + len(some))
        recorder.forward(Batch.of([some], [past], [slot]), cache)


def picked(x: Any, rows: NDArray) -> Any:
    """Some rows of any backend's array; MLX takes lists, and no empty ones."""
    return x[rows.tolist()] if len(rows) else x[:0]


def likeliest(logits: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Of [t, V]: the likeliest tokens and their logprobs, [t, C]; each row's log-sum-exp, [t]."""
    count = min(CANDIDATES, logits.shape[1])
    ids, logprobs, sums = [], [], []
    for first in range(0, len(logits), ROWS):
        x = logits[first : first + ROWS]
        top = x.max(axis=-1, keepdims=True)
        whole = top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True, dtype=np.float64))
        best = np.sort(np.argpartition(x, -count, axis=-1)[:, -count:], axis=-1)
        order = np.argsort(-np.take_along_axis(x, best, axis=-1), axis=-1, kind="stable")
        ids.append(np.take_along_axis(best, order, axis=-1))
        logprobs.append(np.take_along_axis(x, ids[-1], axis=-1) - whole)
        sums.append(whole[:, 0])
    return np.concatenate(ids), np.concatenate(logprobs), np.concatenate(sums)


def sketch(x: NDArray) -> npt.NDArray[np.float32]:
    """[T, ...] -> [T, 5]: root mean square, and four projections of the same size."""
    flat = np.asarray(x.reshape(len(x), -1), np.float32)
    size = np.sqrt(np.einsum("td,td->t", flat, flat) / flat.shape[1])
    joined: npt.NDArray[np.float32] = np.concatenate(
        [size[:, None], flat @ _signs(flat.shape[1])], axis=-1
    )
    return joined


@once
def _signs(width: int) -> npt.NDArray[np.float32]:
    draw = np.random.default_rng(width).integers(0, 2, (width, 4))
    signs: npt.NDArray[np.float32] = ((2 * draw - 1) / np.sqrt(width)).astype(np.float32)
    return signs
