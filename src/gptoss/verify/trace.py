"""A trace: what happened at every token, small enough to keep, and where two of them part.

The file is NumPy's .npz. T tokens, L layers, k experts a token, H heads, C candidates, P points:

    tokens [T]            int32
    came [T]              logprob of the token after those before it (NaN for the first)
    ids, logprobs [T, C]  the likeliest tokens behind each
    chosen, share [T, L, k]  experts and their shares
    sink [T, L, H]        the part of each head's attention that its sink takes
    sketch [T, P, 5]      of every trace point, its root mean square and four projections on fixed
                          random signs, whose differences are as large as those of the values
    point/NAME [T, ...]   values themselves, of the points that were asked for
    about                 one JSON object: format, model, backend, config, prompt, points (names)
"""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Backend, Batch, Cache, Logits
from gptoss.engine import Engine, Request, Stream
from gptoss.engine.stream import Listener
from gptoss.errors import GptOssError
from gptoss.model.reference import NDArray, attend_row
from gptoss.model.weights import Read
from gptoss.verify.candidate import host

FORMAT = "gptoss-trace-1"
CANDIDATES = 10
STEP = 256  # tokens computed together in a replay


@dataclass(frozen=True, eq=False)
class TraceFile:
    """One trace."""

    about: dict[str, Any]
    arrays: dict[str, NDArray]

    @property
    def tokens(self) -> list[int]:
        """What was read."""
        return [int(token) for token in self.arrays["tokens"]]

    def save(self, path: Path | str) -> None:
        """Into a file."""
        with open(path, "wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(self.about)), **self.arrays)

    @classmethod
    def load(cls, path: Path | str) -> "TraceFile":
        """Raises GptOssError for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            about = json.loads(str(arrays.pop("about")))
            shape = len(arrays["tokens"]), len(about["points"]), 5
            if about["format"] == FORMAT and arrays["sketch"].shape == shape:
                return cls(about, arrays)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            pass
        raise GptOssError(f"{path}: is no trace that gptoss has written")


class Recorder:
    """A ``Backend`` that passes everything on to another, and keeps what it sees of one row.

    A row that begins anew begins a new trace; tokens that are computed again replace what was.
    """

    def __init__(self, backend: Backend, read: Read, points: Sequence[str] = ()) -> None:
        """``read``: of the checkpoint, for its sinks; ``points``: whose values are kept whole, by
        full name or without ``block.N.``.
        """
        self.backend, self.config, self.points = backend, backend.config, set(points)
        self.new_cache = backend.new_cache
        self.sample, self.to_numpy = backend.sample, backend.to_numpy
        layers = range(self.config.num_hidden_layers)
        self.sinks = [np.asarray(read(f"block.{i}.attn.sinks"), np.float32) for i in layers]
        self.prompt: int | None = None  # tokens of it, if the rest is an answer
        self.names: list[str] = []
        self.rows: dict[str, list[Any]] = {}  # by position
        self.keys: list[list[Any]] = [[] for _ in layers]
        self.expected: NDArray | None = None  # logprobs behind the last token

    def forward(
        self, batch: Batch, cache: Cache, trace: Callable[[str, Any], None] | None = None
    ) -> Logits:
        """See ``Backend.forward``. Of several rows nothing is kept."""
        if len(batch.slots) != 1:
            return self.backend.forward(batch, cache, trace)
        every = Batch(
            tokens=batch.tokens,
            starts=batch.starts,
            past=batch.past,
            slots=batch.slots,
            wanted=np.arange(len(batch.tokens), dtype=np.int32),
        )
        seen: dict[str, NDArray] = {}

        def keep(name: str, x: Any) -> None:
            seen[name] = host(x)
            if trace is not None:
                trace(name, x if name not in ("norm", "logits") else x[batch.wanted])

        logits = self.backend.forward(every, cache, keep)
        self._keep(int(batch.past[0]), batch.tokens, seen)
        return logits[batch.wanted]

    def _keep(self, past: int, tokens: NDArray, seen: dict[str, NDArray]) -> None:
        new: dict[str, Any] = {"tokens": tokens}
        x = seen["logits"].astype(np.float64)
        x -= x.max(axis=-1, keepdims=True)
        x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
        before = [self.expected if past else None, *x[:-1]]
        new["came"] = [np.nan if b is None else b[t] for b, t in zip(before, tokens, strict=True)]
        new["ids"] = np.argsort(-x, axis=-1, kind="stable")[:, :CANDIDATES]
        new["logprobs"] = np.take_along_axis(x, new["ids"], axis=-1)
        self.expected = x[-1]
        for what in ("chosen", "share"):
            layers = range(self.config.num_hidden_layers)
            new[what] = np.stack([seen[f"block.{i}.mlp.{what}"] for i in layers], axis=1)
        new["sink"] = np.stack([self._sink(i, past, seen) for i in layers], axis=1)
        self.names = list(seen)
        new["sketch"] = np.stack([sketch(seen[name]) for name in self.names], axis=1)
        for name in self.names:
            if self.points & {name, name.split(".", 2)[-1]}:
                new[f"point/{name}"] = seen[name]
        for key, values in new.items():
            kept = self.rows.setdefault(key, [])
            del kept[past:]
            kept.extend(values)

    def _sink(self, layer: int, past: int, seen: dict[str, NDArray]) -> NDArray:
        """[t, H]: what is left of one, of the shares of all keys."""
        here, keys = f"block.{layer}.attn", self.keys[layer]
        del keys[past:]
        keys.extend(seen[f"{here}.k"])
        k = np.stack(keys)
        ones, window = np.ones((*k.shape[:2], 1), k.dtype), self.config.window(layer)
        shares: NDArray = attend_row(seen[f"{here}.q"], k, ones, self.sinks[layer], window)
        return np.maximum(0.0, 1.0 - shares[..., 0])

    def trace(self, **about: Any) -> TraceFile:
        """What was kept; ``about`` goes into the header.

        Raises:
            GptOssError: nothing was.
        """
        if not self.rows:
            raise GptOssError("there is nothing to trace: not one token was computed")
        arrays = {key: np.array(values) for key, values in self.rows.items()}
        for key, x in arrays.items():
            if x.dtype == np.float64:
                arrays[key] = x.astype(np.float32)
            elif x.dtype == np.int64:
                arrays[key] = x.astype(np.int32)
        about |= {"config": asdict(self.config), "points": self.names, "prompt": self.prompt}
        return TraceFile({"format": FORMAT, **about}, arrays)


def record(engine: Engine, recorder: Recorder) -> None:
    """From now on the engine computes through the recorder, every request from its beginning.

    Nothing is guessed ahead, so that a trace holds what was read and no more: the prompt and the
    answer, but for the answer's last token.
    """
    submit = engine.submit

    def plainly(request: Request, listener: Listener | None = None) -> Stream:
        engine.clear()
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


def sketch(x: NDArray) -> npt.NDArray[np.float32]:
    """[T, ...] -> [T, 5]: root mean square, and four projections of the same size."""
    flat = x.reshape(len(x), -1).astype(np.float32)
    size = np.sqrt(np.mean(flat * flat, axis=-1, keepdims=True))
    signs = _signs(flat.shape[1])
    joined: npt.NDArray[np.float32] = np.concatenate([size, flat @ signs], axis=-1)
    return joined


@once
def _signs(width: int) -> npt.NDArray[np.float32]:
    draw = np.random.default_rng(width).integers(0, 2, (width, 4))
    signs: npt.NDArray[np.float32] = ((2 * draw - 1) / np.sqrt(width)).astype(np.float32)
    return signs


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Where two traces part."""

    length: int  # tokens compared
    tokens: int | None  # the first that is another token, in length or in kind; None: none is
    token: int | None  # the first at which some value is another; None: none is
    point: str | None  # the first trace point at that token
    size: float  # of the difference there, relative to the value
    likeliest: int | None  # the first token behind which another is the likeliest


def diff(a: TraceFile, b: TraceFile, tolerance: float = 1e-3) -> Parting:
    """The first token, layer and operation at which b is not a.

    Raises:
        ValueError: they have no trace points in common.
    """
    names = [name for name in a.about["points"] if name in set(b.about["points"])]
    if not names:
        raise ValueError("the traces have no points in common: they are of two different models")
    n = min(len(a.tokens), len(b.tokens))
    x, y = (t.arrays["sketch"][:n, [t.about["points"].index(i) for i in names]] for t in (a, b))
    size = np.maximum(x[..., 0], y[..., 0])
    apart = np.sqrt(np.mean((x - y)[..., 1:].astype(np.float64) ** 2, axis=-1))
    relative = apart / np.where(size > 0, size, 1.0)  # [n, P]
    wrong = ~(relative <= tolerance)
    token = _first(wrong.any(axis=1))
    point = None if token is None else int(wrong[token].argmax())
    other = [i for i in range(n) if a.tokens[i] != b.tokens[i]]
    longer = [n] if len(a.tokens) != len(b.tokens) else []
    return Parting(
        length=n,
        tokens=next(iter(other + longer), None),
        token=token,
        point=None if point is None else names[point],
        size=0.0 if token is None or point is None else float(relative[token, point]),
        likeliest=_first(a.arrays["ids"][:n, 0] != b.arrays["ids"][:n, 0]),
    )


def _first(wrong: NDArray) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None
