"""``KV`` in PyTorch: whole sequences for training, and a cache for generation.

Attention is torch's fused kernel, which knows no sinks. Both entrances here are exact: one more key
whose value is zero and whose score is the sink.
"""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss.backends.protocol import Batch
from gptoss.backends.slots import StripCache
from gptoss.backends.torch.ops import from_numpy
from gptoss.model.config import ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
SPARE = 128  # tokens that a row can always be rewound from the longest it has been
QUERIES = 512  # of one row, attended together at most
GRAIN = 64  # rows whose lengths round up to the same multiple are padded to the longest
SCORES = 1 << 23  # H * queries * keys, attended together at most


class TorchCache(StripCache):
    """Per slot and layer, the keys and values so far, in buffers that grow with their row.

    A full layer holds the whole row. A sliding layer holds the window and what may be rewound into:
    ``SPARE`` tokens at least, twice that at most, however long the row is. A fork copies the bytes:
    neither row ever sees the other's.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dtype, self.device = dtype, device
        shape = config.num_key_value_heads, 1, config.head_dim

        def blank(window: int | None) -> Strip:
            empty = torch.zeros(shape, dtype=dtype, device=device)
            return Strip(empty, empty, window)

        super().__init__(config, max_tokens, blank)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values now allocated."""
        return sum(2 * strip.k.nbytes for strips in self.strips.values() for strip in strips)


class Strip:
    """One layer's keys and values of one row: positions ``first`` to ``length - 1``.

    Row 0 of both buffers is zero for ever, the key and value of the sink; position ``first`` is
    row 1. Invariant: everything that a query at ``length`` can see is held.
    """

    def __init__(self, k: Tensor, v: Tensor, window: int | None) -> None:
        self.k, self.v, self.window = k, v, window  # [K, 1 + capacity, d]
        self.first = self.length = 0

    @property
    def held(self) -> int:
        """Positions held."""
        return self.length - self.first

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [K, t, d] -> the zero row and all that the new queries may see."""
        t, held = k.shape[1], self.held
        limit = None if self.window is None else self.window - 1 + 2 * SPARE
        if limit is None or held + t <= limit:
            self._grow(held + t, limit)
            self.k[:, 1 + held : 1 + held + t], self.v[:, 1 + held : 1 + held + t] = k, v
            self.length += t
            return self.k[:, : 1 + held + t], self.v[:, : 1 + held + t]
        assert self.window is not None
        keys = torch.cat([self.k[:, : 1 + held], k], dim=1)
        values = torch.cat([self.v[:, : 1 + held], v], dim=1)
        keep = min(self.window - 1 + SPARE, held + t)
        self._grow(keep, limit)
        self.k[:, 1 : 1 + keep], self.v[:, 1 : 1 + keep] = keys[:, -keep:], values[:, -keep:]
        self.length += t
        self.first = self.length - keep
        return keys, values

    def head(self, length: int, *, shared: bool = False) -> "Strip":
        """The strip as it was when the row had ``length`` tokens; shared: in bytes of its own."""
        new = Strip(self.k, self.v, self.window)
        new.length = min(length, self.length)
        new.first = min(self.first, new.length)
        if shared or 2 * (1 + new.held) < self.k.shape[1]:  # give back what is not worth keeping
            new.k, new.v = (x[:, : 1 + new.held].clone() for x in (self.k, self.v))
        return new

    def host(self) -> list[npt.NDArray[Any]]:
        """What is held, as NumPy arrays [1, K, held, d]."""
        held = [x[None, :, 1 : 1 + self.held].cpu() for x in (self.k, self.v)]
        if self.k.dtype is torch.bfloat16:  # which NumPy has not
            return [x.view(torch.uint16).numpy().view(BF16) for x in held]
        return [x.numpy() for x in held]

    def of(self, arrays: list[npt.NDArray[Any]], length: int) -> "Strip":
        """The strip of a row of ``length`` tokens that had this on the host."""
        new, (k, v) = Strip(self.k, self.v, self.window), (from_numpy(x[0]) for x in arrays)
        new.extend(k.to(self.k), v.to(self.v))
        new.first, new.length = length - new.held, length
        return new

    def _grow(self, rows: int, limit: int | None) -> None:
        """Room for ``rows`` positions, a quarter more at a time."""
        capacity = self.k.shape[1] - 1
        if rows <= capacity:
            return
        capacity = max(rows, capacity * 5 // 4, 16)
        capacity = capacity if limit is None else min(capacity, limit)
        K, old, d = self.k.shape
        for name in ("k", "v"):
            buffer = self.k.new_zeros(K, 1 + capacity, d)
            buffer[:, :old] = getattr(self, name)
            setattr(self, name, buffer)


class TorchView:
    """``KV`` for one step: every row with its own past."""

    def __init__(self, cache: TorchCache, batch: Batch) -> None:
        self.cache, self.slots = cache, batch.slots.tolist()
        self.starts, self.past = batch.starts.tolist(), batch.past.tolist()

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None
    ) -> Tensor:
        """See ``KV.attend``."""
        out = torch.empty_like(q)
        for r, slot in enumerate(self.slots):
            new, strip = slice(self.starts[r], self.starts[r + 1]), self.cache.strips[slot][layer]
            assert strip.length == self.past[r], f"slot {slot} holds {strip.length} tokens"
            keys, values = strip.extend(k[new].transpose(0, 1), v[new].transpose(0, 1))
            out[new] = attend_past(q[new], keys, values, sinks, window)
        return out


def attend_past(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """See ``gptoss.model.reference.attend_row``; a few queries at a time, so memory is bounded.

    Args:
        q: [t, H, d], the newest t tokens of one row.
        k, v: [K, 1 + n, d], a row of zeros and then the n >= t keys, oldest first.
        sinks: [H].
        window: how many keys each query sees, its own included (None: all).

    Returns:
        [t, H, d].
    """
    t, H, d = q.shape
    K, n = k.shape[0], k.shape[1] - 1
    out, start = torch.empty_like(q), 0
    while start < t:
        step = max(1, min(QUERIES, SCORES // (H * min(n, QUERIES + (window or n)))))
        stop = min(start + step, t)
        low = 0 if window is None else max(0, n - t + start - window + 1)  # oldest key anyone sees
        high = n - t + stop
        keys, values = (
            x[:, : 1 + high] if low == 0 else torch.cat([x[:, :1], x[:, 1 + low : 1 + high]], dim=1)
            for x in (k, v)
        )
        # Queries of the heads that share a key head are laid side by side: no key is repeated.
        c = stop - start
        queries = q[start:stop].view(c, K, H // K, d).permute(1, 2, 0, 3)  # [K, H/K, c, d]
        age = torch.arange(n - t + start, n - t + stop, device=q.device)[:, None] - torch.arange(
            low, high, device=q.device
        )  # [c, high - low], 0 is "now"
        hidden = age < 0 if window is None else (age < 0) | (age >= window)
        mask = q.new_zeros(K, H // K, c, 1 + high - low)
        mask[..., 1:].masked_fill_(hidden, -torch.inf)
        mask[..., 0] = sinks.view(K, H // K, 1)
        mixed = F.scaled_dot_product_attention(
            queries.flatten(1, 2)[None], keys[None], values[None], mask.flatten(1, 2)[None]
        )  # [1, K, H/K * c, d]
        out[start:stop] = mixed.view(K, H // K, c, d).permute(2, 0, 1, 3).reshape(c, H, d)
        start = stop
    return out


class FullSequences:
    """``KV`` of rows that are all new: training and teacher forcing. Nothing is kept.

    Rows of about the same length are attended together, padded on the right with tokens that
    causality hides.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.longest = lengths, max(lengths)
        self.even = all(n == self.longest for n in lengths)
        self.groups: list[tuple[Tensor, int]] = []
        self.home: Tensor | None = None
        if not self.even:
            self.groups, self.home = _grouped(lengths)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None
    ) -> Tensor:
        """See ``KV.attend``."""
        if self.even:
            q, k, v = (by_head(x, self.longest) for x in (q, k, v))
            return self.mix(layer, q, k, v, sinks, window).transpose(1, 2).flatten(0, 1)
        outs = []
        for where, length in self.groups:
            here = where.to(q.device)
            rq, rk, rv = (by_head(x.index_select(0, here), length) for x in (q, k, v))
            outs.append(self.mix(layer, rq, rk, rv, sinks, window).transpose(1, 2).flatten(0, 1))
        assert self.home is not None
        return torch.cat(outs).index_select(0, self.home.to(q.device))

    def mix(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None
    ) -> Tensor:
        """Rows of one length: [B, H, T, d], [B, K, T, d] -> [B, H, T, d]."""
        return attend_whole(q, k, v, sinks, window)


def _grouped(lengths: Sequence[int]) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """Rows of about the same length together, and where each token is in what comes out.

    Returns:
        By group: int [B * length], the token at each place (the row's last one where it has ended),
        and the group's length. Then int [T]: the place of each token in all the groups, joined.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for n in lengths:
        groups.setdefault(-(-n // GRAIN) * GRAIN, []).append((start, n))
        start += n
    home, offset, found = torch.empty(start, dtype=torch.long), 0, []
    for rows in groups.values():
        longest = max(n for _, n in rows)
        place = torch.arange(longest)
        found.append((torch.cat([first + place.clamp(max=n - 1) for first, n in rows]), longest))
        for first, n in rows:
            home[first : first + n] = offset + place[:n]
            offset += longest
    return found, home


def by_head(x: Tensor, length: int) -> Tensor:
    """[B * T, H, d] -> [B, H, T, d], T being ``length``."""
    return x.reshape(-1, length, *x.shape[1:]).transpose(1, 2)


def attend_whole(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """Causal attention of whole sequences to themselves, differentiable.

    Args:
        q: [B, H, T, d].
        k, v: [B, K, T, d].
        sinks: [H], a logit per head.
        window: how many keys each query sees, its own included (None: all).

    Returns:
        [B, H, T, d]. Memory grows with T (and the window), not with its square.
    """
    T = q.shape[2]
    if window is None or window >= T:
        return _with_sinks(q, k, v, sinks, None)
    first = _with_sinks(q[:, :, :window], k[:, :, :window], v[:, :, :window], sinks, None)
    # The other queries in blocks as long as the window: a block sees its own keys and the block
    # before. The last block is padded; nobody looks at its padding.
    pad = -T % window
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q[:, :, window:], k, v))
    blocks = q.shape[2] // window
    q = (
        q.reshape(*q.shape[:2], blocks, window, -1).transpose(1, 2).flatten(0, 1)
    )  # [B * blocks, H, W, d]
    k, v = (
        x.unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v)
    )  # [B * blocks, K, 2W, d]
    age = torch.arange(window, 2 * window, device=q.device)[:, None] - torch.arange(
        2 * window, device=q.device
    )  # [W, 2W], 0 is "now"
    rest = _with_sinks(q, k, v, sinks, (age >= 0) & (age < window))
    rest = (
        rest.reshape(-1, blocks, *rest.shape[1:]).transpose(1, 2).flatten(2, 3)
    )  # [B, H, blocks * W, d]
    return torch.cat([first, rest[:, :, : T - window]], dim=2)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Tensor | None) -> Tensor:
    """Fused attention with one more key, whose score IS the sink: causal, or as ``visible`` says.

    The fused kernels refuse a mask that wants a gradient, so the sink travels in one more column:
    queries hold the sink there, the extra key holds what the scaling takes away, ordinary keys 0.
    The causal kernel counts queries and keys from the same start, so it gets a query more as well.
    """
    d, front = q.shape[-1], int(visible is None)
    extra = 8 if q.is_cuda else 1  # columns; the fused CUDA kernels want multiples of eight
    one = torch.zeros(d + extra, dtype=k.dtype, device=k.device)
    one[d] = d**0.5
    q = F.pad(q, (0, extra, front, 0)) + F.pad(sinks.to(q.dtype)[:, None, None], (d, extra - 1))
    k = torch.cat([one.expand(*k.shape[:2], 1, -1), F.pad(k, (0, extra))], dim=2)
    v = F.pad(v, (0, extra, 1, 0))
    mask = None if visible is None else F.pad(visible, (1, 0), value=True)
    mixed = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=d**-0.5, enable_gqa=q.shape[1] != k.shape[1]
    )
    return mixed[:, :, front:, :d]
