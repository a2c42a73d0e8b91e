"""``Backend`` over the compiled core: packed weights stay packed, and mapped where they can."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss import _core
from gptoss.backends import is_narrow
from gptoss.backends.native.cache import NativeCache, NativeView
from gptoss.backends.native.ops import NativeOps, weight, widened
from gptoss.backends.native.resident import Resident, let_go
from gptoss.backends.protocol import Batch, Cache, Sampling
from gptoss.backends.sampling import sample_rows
from gptoss.model import model
from gptoss.model.config import ModelConfig
from gptoss.model.weights import Read, build

STEP = 512  # new tokens computed together at most: bounds the memory of a long prompt
DISK_STEP = 2048  # the same while experts are on disk: each step may read them all
PRECISIONS = ("fast", "exact")
ROUNDED = ("qkv.weight", "out.weight", "unembedding.weight")


class NativeBackend:
    """Runs ``model.forward`` with ``NativeOps``.

    Args:
        precision: "exact" multiplies weights as published (the large dense matrices packed at load,
            a quarter smaller and without loss), with float32 activations or, where
            experts are packed in MXFP4, with 16 bits and a scale to each 32 numbers. "fast" rounds
            the large dense matrices to 8 bits at load (a scale to each 32 numbers) and activations
            to 8 bits before each product with those and with packed experts. In a model of less
            than ``NARROW`` either saves little and may turn near ties between experts over: there
            activations are float32 in both.
        threads: how many share an operation; None: the cores this process may use.
        kv: how keys and values are kept: "bfloat16" (None: with fast), "float32" (with exact:
            rounded to bfloat16 they turn near ties between experts over), or "int8", a scale to
            each key and value of a head.
        resident: most bytes of packed experts to keep mapped; the others stay on disk until they
            are used. None: no limit.

    Raises:
        ValueError: an unknown precision or kv, no thread, or nothing resident.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Read,
        precision: str = "fast",
        threads: int | None = None,
        kv: str | None = None,
        resident: int | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        _core.set_threads(_core.usable_cores() if threads is None else threads)
        held = None if resident is None else Resident(resident)
        self.step = STEP if held is None else DISK_STEP
        self.config, self.precision, self.ops = config, precision, NativeOps(held)
        wide = not is_narrow(config)
        fast = precision == "fast" and wide
        self.kv = kv or ("bfloat16" if fast else "float32")

        def load(name: str) -> Any:
            stored = read(name)
            if name.endswith(("mlp1_weight", "mlp2_weight")):
                experts = weight(stored)
                if wide and not isinstance(stored, np.ndarray):
                    experts.use_bytes(1 if fast else 2)
                if held is not None:
                    held.watch(experts, stored)
                return experts
            if name == "embedding.weight":
                return stored
            if name.endswith(".weight"):
                dense = weight(stored)
                if wide and name.endswith(ROUNDED):
                    if fast:
                        dense.use_bytes()
                    else:
                        dense.use_twelve()
                    let_go(stored)
                return dense
            return widened(np.asarray(stored))

        self.weights = build(config, load)
        if held is not None:
            held.settle()

    def new_cache(self, *, max_tokens: int) -> NativeCache:
        """See ``Backend.new_cache``."""
        return NativeCache(self.config, max_tokens, self.kv)

    def forward(
        self, batch: Batch, cache: Cache, trace: model.Trace | None = None
    ) -> npt.NDArray[np.float32]:
        """See ``Backend.forward``. A long batch is computed in steps of ``STEP`` tokens."""
        assert isinstance(cache, NativeCache)
        batch.check(self.config)
        logits = np.empty((len(batch.wanted), self.config.vocab_size), np.float32)
        traced: dict[str, list[tuple[npt.NDArray[np.intp], Any]]] = {}
        here: npt.NDArray[np.intp]

        def keep(name: str, x: Any) -> None:
            traced.setdefault(name, []).append((here, x))

        try:
            _core.begin_step()  # in here: an interrupt right behind it must end the step
            for piece, here in pieces(batch, self.step):
                logits[here] = model.forward(
                    self.weights,
                    piece.tokens,
                    piece.positions,
                    piece.wanted,
                    kv=NativeView(cache, piece),
                    ops=self.ops,
                    config=self.config,
                    trace=keep if trace else model.no_trace,
                )
        finally:
            _core.end_step()
        if trace:
            for name, parts in traced.items():
                trace(name, gathered(parts, len(batch.wanted)))
        return logits

    def sample(
        self, logits: Any, rules: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int]:
        """See ``Backend.sample``."""
        return sample_rows(logits, rules, uniforms)

    def to_numpy(self, logits: Any) -> npt.NDArray[np.float32]:
        """See ``Backend.to_numpy``."""
        return np.asarray(logits, np.float32)


def pieces(batch: Batch, most: int) -> Iterator[tuple[Batch, npt.NDArray[np.intp]]]:
    """The batch in parts of at most ``most`` tokens, with which of ``wanted`` each part has."""
    if len(batch.tokens) <= most:
        yield batch, np.arange(len(batch.wanted))
        return
    for first in range(0, len(batch.tokens), most):
        last = min(first + most, len(batch.tokens))
        starts = np.clip(batch.starts, first, last)
        rows = np.flatnonzero(np.diff(starts))  # those with a token in this part
        here = np.flatnonzero((batch.wanted >= first) & (batch.wanted < last))
        part = Batch(
            tokens=batch.tokens[first:last],
            starts=np.append(starts[rows], last).astype(np.int32) - first,
            past=batch.past[rows] + starts[rows] - batch.starts[rows],
            slots=batch.slots[rows],
            wanted=batch.wanted[here] - first,
        )
        yield part, here


def gathered(parts: list[tuple[npt.NDArray[np.intp], Any]], wanted: int) -> Any:
    """What the parts traced under one name, as the whole batch would have traced it."""
    if len(parts) == 1:
        return parts[0][1]
    if sum(len(x) for _, x in parts) == wanted and all(len(h) == len(x) for h, x in parts):
        whole = np.empty((wanted, *parts[0][1].shape[1:]), parts[0][1].dtype)
        for here, x in parts:
            whole[here] = x
        return whole
    return np.concatenate([x for _, x in parts])
