"""Conversations as they would be seen in a released model, without the model."""

import numpy as np

from gptoss.model.config import gpt_oss_20b
from gptoss.sight.attention import threshold
from gptoss.sight.lens import Reading
from gptoss.sight.look import SOURCES, WEIGHTS, Sight, Sources


def wide(tokens, config=None, seed=0):
    """Noise of a 20b's shapes, which compresses worse than any model: every number is random."""
    config, rng = config or gpt_oss_20b(), np.random.default_rng(seed)
    T, L, H, V = len(tokens), config.num_hidden_layers, config.num_attention_heads, 200_000

    def reading(k):
        logprobs = -np.sort(rng.gamma(2.0, 2.0, (T, k)), axis=-1)
        return Reading(
            rng.integers(0, V, (T, k)), logprobs, -rng.gamma(1.0, 3.0, T), rng.integers(1, V, T)
        )

    def sources():
        share = rng.dirichlet(np.full(16, 0.3), (T, H)).astype(np.float32)
        weight = -np.sort(-share[..., 1:], axis=-1)[..., :SOURCES]
        kept = weight >= threshold(weight[..., 1:], max(0, WEIGHTS // L - T * H))
        kept[..., 0] = True
        where = rng.integers(0, np.arange(1, T + 1)[:, None, None], weight.shape)
        return Sources(share[..., 0], weight * kept, where)

    k = config.experts_per_token
    return Sight(
        config,
        np.asarray(tokens),
        reading(10),
        [reading(5) for _ in range(L)],
        [sources() for _ in range(L)],
        rng.integers(0, config.num_experts, (T, L, k)),
        rng.dirichlet(np.ones(k), (T, L)),
    )
