"""``KV`` in PyTorch: whole sequences for training, and a cache for generation.

Attention is torch's fused kernel, which knows no sinks. Both of its two entrances here are exact:
one more key whose logit is the sink and whose value is zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class FullSequences:
    """``KV`` of rows that are all new: training and teacher forcing. Nothing is kept."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.longest = lengths, max(lengths)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None
    ) -> Tensor:
        """See ``KV.attend``."""
        if all(n == self.longest for n in self.lengths):
            q, k, v = (by_head(x, self.longest) for x in (q, k, v))
            return attend_whole(q, k, v, sinks, window).transpose(1, 2).flatten(0, 1)
        outs, start = [], 0
        for n in self.lengths:
            row = slice(start, start + n)
            rq, rk, rv = (by_head(x[row], n) for x in (q, k, v))
            mixed = attend_whole(rq, rk, rv, sinks, window)
            outs.append(mixed[0].transpose(0, 1))
            start += n
        return torch.cat(outs)


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
