"""``KV`` in MLX: a cache of one growing buffer per layer and row, bounded where the layer slides.

Arrays of MLX are values: two rows that share a prefix share its bytes until one of them writes.
"""

from functools import lru_cache, partial
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from gptoss.backends.mlx.ops import on_cpu
from gptoss.backends.protocol import Batch
from gptoss.backends.slots import StripCache
from gptoss.model.config import ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
SPARE = 128  # tokens that a row can always be rewound from the longest it has been
QUERIES = 256  # of one row, attended together at most
SCORES = 1 << 23  # H * queries * keys together at most on a CPU, which holds them all


class MlxCache(StripCache):
    """Per slot and layer, the keys and values so far.

    A full layer holds the whole row. A sliding layer holds the window and what may be rewound into:
    ``SPARE`` tokens at least, twice that at most, however long the row is.

    Args:
        dtype: of keys and values as they come and go.
        group: numbers that share a scale where they are kept in 8 bits; None: they are kept as is.
    """

    def __init__(
        self, config: ModelConfig, max_tokens: int, dtype: mx.Dtype, group: int | None = None
    ) -> None:
        self.dtype, self.group = dtype, group
        token = mx.zeros((1, config.num_key_value_heads, 1, config.head_dim), dtype)
        empty = [x[:, :, :0] for x in self.pack(token, token)]
        mx.eval(empty)
        super().__init__(config, max_tokens, partial(Strip, empty))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values now allocated."""
        return sum(x.nbytes for strips in self.strips.values() for s in strips for x in s.parts)

    def pack(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """Keys and values [1, K, t, d] as they are kept: arrays of [1, K, t, ...]."""
        if self.group is None:
            return [k, v]
        return [*mx.quantize(k, self.group, 8), *mx.quantize(v, self.group, 8)]

    def unpack(self, parts: list[mx.array]) -> tuple[mx.array, mx.array]:
        """Keys and values again."""
        if self.group is None:
            return parts[0], parts[1]
        (kw, ks, kb), (vw, vs, vb), group = parts[:3], parts[3:], self.group
        return mx.dequantize(kw, ks, kb, group, 8), mx.dequantize(vw, vs, vb, group, 8)


class Strip:
    """One layer's keys and values of one row: positions ``first`` to ``length - 1``.

    Invariant: everything that a query at ``length`` can see is held.
    """

    def __init__(
        self, parts: list[mx.array], window: int | None, first: int = 0, length: int = 0
    ) -> None:
        self.parts, self.window = parts, window  # see MlxCache.pack; [1, K, capacity, ...]
        self.first, self.length = first, length

    @property
    def held(self) -> int:
        """Positions held."""
        return self.length - self.first

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return int(self.parts[0].shape[2])

    def extend(self, new: list[mx.array]) -> list[mx.array]:
        """Append the parts of t tokens -> those of all that the new queries may see."""
        t, held = new[0].shape[2], self.held
        total = held + t
        self.length += t
        if self.window is not None and total > self.window - 1 + 2 * SPARE:
            old = [x[:, :, :held] for x in self.parts]
            both = [mx.concatenate([a, b], axis=2) for a, b in zip(old, new, strict=True)]
            keep = self.window - 1 + SPARE
            self.first = self.length - keep
            self.parts = [mx.contiguous(x[:, :, -keep:]) for x in both]
            return both
        if total > self.capacity:
            room = max(total, self.capacity * 5 // 4) + SPARE
            if self.window is not None:
                room = min(room, self.window - 1 + 2 * SPARE)
            pad = [(0, 0), (0, 0), (0, room - held), (0, 0)]
            self.parts = [mx.pad(x[:, :, :held], pad) for x in self.parts]
        for x, y in zip(self.parts, new, strict=True):
            x[:, :, held:total] = y
        return [x[:, :, :total] for x in self.parts]

    def head(self, length: int, *, shared: bool = False) -> "Strip":
        """The strip as it was when the row had ``length`` tokens; ``shared``: and goes on itself.

        A buffer that is mostly unused is given back; else two rows share it until one writes.
        """
        length = min(length, self.length)
        parts, held = self.parts, length - min(self.first, length)
        if unused := 2 * (held + SPARE) < self.capacity:
            parts = [mx.contiguous(x[:, :, :held]) for x in parts]
        elif shared:
            parts = [x[:, :, :held] for x in parts]
        if unused or shared:
            mx.eval(parts)  # another thread may write next
        return Strip(parts, self.window, length - held, length)

    def host(self) -> list[npt.NDArray[Any]]:
        """What is held, as NumPy arrays [1, K, held, ...]."""
        parts = [mx.contiguous(x[:, :, : self.held]) for x in self.parts]
        return [
            np.array(x.view(mx.uint16)).view(BF16) if x.dtype == mx.bfloat16 else np.array(x)
            for x in parts
        ]

    def of(self, arrays: list[npt.NDArray[Any]], length: int) -> "Strip":
        """The strip of a row of ``length`` tokens that had this on the host."""
        parts = [mx.array(x) for x in arrays]
        mx.eval(parts)
        return Strip(parts, self.window, length - parts[0].shape[2], length)


class MlxView:
    """``KV`` for one step: every row with its own past."""

    def __init__(self, cache: MlxCache, batch: Batch) -> None:
        self.cache, self.slots = cache, batch.slots.tolist()
        self.starts, self.past = batch.starts.tolist(), batch.past.tolist()

    def attend(
        self,
        layer: int,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        sinks: mx.array,
        window: int | None,
    ) -> mx.array:
        """See ``KV.attend``."""
        outs = []
        q, k, v = (x.swapaxes(0, 1)[None] for x in (q, k, v))  # [1, heads, T, d]
        for r, slot in enumerate(self.slots):
            new, strip = slice(self.starts[r], self.starts[r + 1]), self.cache.strips[slot][layer]
            assert strip.length == self.past[r], f"slot {slot} holds {strip.length} tokens"
            seen = strip.extend(self.cache.pack(k[:, :, new], v[:, :, new]))
            outs += attend_past(q[:, :, new], *self.cache.unpack(seen), sinks, window)
        return mx.concatenate(outs, axis=2)[0].swapaxes(0, 1)

    @property
    def arrays(self) -> list[mx.array]:
        """All that this step has written to."""
        return [x for slot in self.slots for s in self.cache.strips[slot] for x in s.parts]


def attend_past(
    q: mx.array, k: mx.array, v: mx.array, sinks: mx.array, window: int | None
) -> list[mx.array]:
    """See ``gptoss.model.reference.attend_row``; a few queries at a time, so memory is bounded.

    Args:
        q: [1, H, t, d], the newest t tokens of one row.
        k, v: [1, K, n, d], the n >= t keys, oldest first.
        sinks: [H].
        window: how many keys each query sees, its own included (None: all).

    Returns:
        [1, H, ., d] pieces, t queries together.
    """
    (_, H, t, d), n = q.shape, k.shape[2]
    step, outs = QUERIES, []
    if on_cpu():
        step = max(1, min(QUERIES, SCORES // (H * min(n, QUERIES + (window or n)))))
    for start in range(0, t, step):
        c = min(step, t - start)
        high = n - t + start + c
        low = 0 if window is None else max(0, high - c - window + 1)  # oldest key anyone sees
        mask: str | mx.array | None = None
        if c > 1:
            hides = window is not None and high - low > window
            mask = _band(c, high - low, window or 0) if hides else "causal"
        keys, values = k[:, :, low:high], v[:, :, low:high]
        outs.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start : start + c], keys, values, scale=d**-0.5, mask=mask, sinks=sinks
            )
        )
    return outs


@lru_cache(maxsize=16)
def _band(queries: int, keys: int, window: int) -> mx.array:
    """bool [queries, keys]: which of the keys each of the newest ones sees."""
    age = np.arange(keys - queries, keys)[:, None] - np.arange(keys)  # 0 is "now"
    return mx.array((age >= 0) & (age < window))
