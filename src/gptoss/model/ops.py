"""The eight operations gpt-oss is made of: shapes and mathematics, no code.

``model.py`` wires them; every backend supplies them. Seven are here, the eighth (attention over the
past) belongs to the cache: ``KV.attend``. Shapes use one alphabet everywhere:

    T tokens in this step   D hidden_size    V vocab_size    W tokens whose logits are wanted
    H query heads           K key heads      d head_dim
    E experts               F intermediate   R rows (sequences) in this step
"""

from typing import Any, Protocol

from gptoss.model.config import ModelConfig

Array = Any  # whatever this backend computes with: np.ndarray, torch.Tensor, mx.array, ...


class Ops(Protocol):
    """What a backend must be able to compute. Arguments are on the backend's device."""

    def gather(self, table: Array, rows: Array) -> Array:
        """``table[rows]``: [N, D], [T] -> [T, D]."""

    def rms_norm(self, x: Array, scale: Array, eps: float) -> Array:
        """``x / sqrt(mean(x**2) + eps) * scale`` over the last axis, in at least float32."""

    def linear(self, x: Array, weight: Array, bias: Array | None) -> Array:
        """``x @ weight.T + bias``: [T, i], [o, i], [o] -> [T, o]."""

    def rope(self, x: Array, positions: Array, config: ModelConfig) -> Array:
        """Rotate pairs (i, i + d/2) of each head by the YaRN angles: [T, H, d] -> [T, H, d]."""

    def route(self, scores: Array, k: int) -> tuple[Array, Array]:
        """Top-k experts and the softmax over just those: [T, E] -> int [T, k], float [T, k].

        Best first; of equal scores the lower expert index first.
        """

    def experts(self, x: Array, w: Any, chosen: Array, share: Array, config: ModelConfig) -> Array:
        """Weighted sum of the chosen experts' clamped SwiGLU MLPs: [T, D] -> [T, D].

        For expert e: ``swiglu(x @ mlp1[e].T + mlp1_bias[e]) @ mlp2[e].T + mlp2_bias[e]``, times its
        share, the bias included. mlp1 [E, 2F, D] and mlp2 [E, D, F] may still be packed.
        """

    def reduce(self, x: Array) -> Array:
        """Sum ``x`` over the ranks that share this layer; ``x`` itself when alone."""


class KV(Protocol):
    """The past of every row in this step, as the model sees it."""

    def attend(
        self, layer: int, q: Array, k: Array, v: Array, sinks: Array, window: int | None
    ) -> Array:
        """Append k, v [T, K, d] to ``layer`` and attend q [T, H, d] to it -> [T, H, d].

        ``softmax([q @ k.T / sqrt(d), sink])`` without its last column, times v: causal within each
        row; with a window, key j is visible to query i when ``i - window < j <= i``. The sink [H]
        is a logit per head, not scaled, that takes probability and gives nothing back.
        """
