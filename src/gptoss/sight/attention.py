"""Where heads look: the weights behind ``KV.attend``, which a trace does not hold but implies.

They are computed from the traced queries and keys, with the mask and the sink of
``model/reference.py``; what that does with them, mixing values, is not done here.
"""

import numpy as np

from gptoss.model.reference import NDArray, softmax

LEAST = 1 / 255  # less, a byte cannot tell from nothing


def attention_weights(q: NDArray, k: NDArray, sinks: NDArray, window: int | None) -> NDArray:
    """What each of a row's newest tokens gives to every token so far, and to the sink.

    Args:
        q: [t, H, d], rotated, of the newest t tokens.
        k: [n, K, d], rotated, of all n >= t tokens.
        sinks: [H].
        window: how many keys each query sees, its own included (None: all).

    Returns:
        [t, H, n + 1], rows that sum to one; the last column is the sink's.
    """
    (t, H, d), (n, K, _) = q.shape, k.shape
    grouped = q.reshape(t, K, H // K, d)
    scores = np.einsum("tkgd,nkd->tkgn", grouped, k, optimize=True).reshape(t, H, n) * d**-0.5
    age = np.arange(n - t, n)[:, None] - np.arange(n)  # [t, n], 0 is "now"
    hidden = (age < 0) | (age >= (window or n))
    scores = np.where(hidden[:, None], -np.inf, scores)
    return softmax(np.concatenate([scores, np.broadcast_to(sinks[:, None], (t, H, 1))], axis=-1))


def strongest(weights: NDArray, count: int) -> tuple[NDArray, NDArray]:
    """The greatest along the last axis, greatest first, and where they are.

    ``weights`` [..., n] -> two of [..., count]; places that do not exist have weight 0.
    """
    short = count - weights.shape[-1]
    if short > 0:
        weights = np.concatenate([weights, np.zeros((*weights.shape[:-1], short))], axis=-1)
    where = np.argpartition(-weights, count - 1, axis=-1)[..., :count]
    best = np.take_along_axis(weights, where, axis=-1)
    order = np.argsort(-best, axis=-1, kind="stable")
    return np.take_along_axis(best, order, axis=-1), np.take_along_axis(where, order, axis=-1)


def threshold(weights: NDArray, most: int) -> float:
    """The least weight worth keeping: of all these, at most ``most`` are as great."""
    if most >= weights.size:
        return LEAST
    next_best = float(np.partition(weights, weights.size - most - 1, axis=None)[-most - 1])
    return max(LEAST, float(np.nextafter(np.float32(next_best), np.float32(1))))
