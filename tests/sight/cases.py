"""Conversations as they would be seen in a released model, without the model."""

import numpy as np

from gptoss.model.config import gpt_oss_20b
from gptoss.sight.attention import LEAST, threshold
from gptoss.sight.lens import Reading
from gptoss.sight.look import SOURCES, WEIGHTS, Sight, Sources


def wide(tokens, config=None, seed=0):
    """Noise of a 20b's shapes: as much is kept as can be, every byte of it is equally likely to be
    any, and so no conversation of a model makes a larger page.
    """
    config, rng = config or gpt_oss_20b(), np.random.default_rng(seed)
    T, L, H, V = len(tokens), config.num_hidden_layers, config.num_attention_heads, 200_000

    def reading(k):
        logprobs = -np.sort(rng.uniform(0, 65, (T, k)), axis=-1)
        return Reading(
            rng.integers(0, V, (T, k)), logprobs, -rng.uniform(0, 65, T), rng.integers(1, V, T)
        )

    def sources():
        weight = -np.sort(-rng.uniform(LEAST, 1, (T, H, SOURCES)), axis=-1).astype(np.float32)
        weight = np.minimum(weight, rng.uniform(LEAST, 1, (T, H, 1)).astype(np.float32))
        kept = weight >= threshold(weight[..., 1:], max(0, WEIGHTS // L - T * H))
        kept[..., 0] = True
        where = rng.integers(0, np.arange(1, T + 1)[:, None, None], weight.shape)
        return Sources(rng.uniform(0, 1, (T, H)), weight * kept, where)

    k = config.experts_per_token
    return Sight(
        config,
        np.asarray(tokens),
        reading(10),
        [reading(5) for _ in range(L)],
        [sources() for _ in range(L)],
        rng.integers(0, config.num_experts, (T, L, k)),
        rng.uniform(0, 1, (T, L, k)),
    )
