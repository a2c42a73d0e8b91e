"""From one row of logits to a token: randomness, penalties, masks, logprobs."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Logits
from gptoss.engine.request import Constraint, Request
from gptoss.errors import GptOssError

Floats = npt.NDArray[np.float32]
MASK = (1 << 64) - 1


def philox(seed: int, position: int) -> int:
    """64 random bits, a function of (seed, position) alone.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": Philox4x64 of ten rounds,
    the first word of ``np.random.Philox(key=[seed, position])``, whose import alone takes longer
    than a small model's first token.
    """
    a, b, c, d = 1, 0, 0, 0
    for _ in range(10):
        low, high = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = high >> 64 ^ b ^ seed, high & MASK, low >> 64 ^ d ^ position, low & MASK
        seed, position = seed + 0x9E3779B97F4A7C15 & MASK, position + 0xBB67AE8584CAA73B & MASK
    return a


def uniform(seed: int, position: int) -> float:
    """The one random number in [0, 1) behind the token at ``position`` of its sequence.

    Not a function of the batch, the backend or the clock.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0..2**64 - 1, not {seed}")
    return (philox(seed, position) >> 11) * 2.0**-53


def derived(seed: int, i: int) -> int:
    """The seed of answer ``i`` to a request: its own for the first, others from far positions."""
    return philox(seed, MASK - i) if i else seed


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """[V] -> [V], in float64."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    return x


def likeliest(logprobs: npt.NDArray[np.float64], k: int) -> list[tuple[int, float]]:
    """The k largest of [V], as (token, logprob), largest first; of equals, smaller ids first."""
    k = min(k, len(logprobs))
    if k == 0:
        return []
    least = np.partition(logprobs, len(logprobs) - k)[len(logprobs) - k]
    tokens = np.flatnonzero(logprobs >= least)  # more than k where some are equal
    order = np.argsort(-logprobs[tokens], kind="stable")[:k]
    return [(int(t), float(logprobs[t])) for t in tokens[order]]


def check_finite(logits: Logits) -> None:
    """Raises GptOssError if there is NaN or +inf in [W, V] logits of the model's own."""
    if not bool((logits < float("inf")).all()):  # false for NaN too
        raise GptOssError(
            "the model's output contains NaN or infinity: the checkpoint is damaged, or its "
            "weights are too large for this dtype. `gptoss inspect --check` says where."
        )


def is_plain(request: Request) -> bool:
    """Whether the logits need no change before sampling, at any token."""
    return (
        request.repetition_penalty == 1.0
        and request.frequency_penalty == request.presence_penalty == 0.0
        and not request.logit_bias
        and request.constraint is None
        and request.min_tokens == 0
    )


def adjusted(
    logits: Floats, request: Request, answer: Sequence[int], constraint: Constraint | None
) -> Floats:
    """[V] logits after ``answer`` as the request's penalties, bias and masks leave them; a copy.

    Raises:
        GptOssError: no token is left.
    """
    x = np.array(logits, np.float32)
    penalize(x, request, answer)
    for token, bias in request.logit_bias.items():
        x[token] += bias
    if constraint is not None and (allowed := constraint.mask()) is not None:
        x[~allowed[: len(x)]] = -np.inf
    if len(answer) < request.min_tokens:
        x[[t for t in request.stop_tokens if t < len(x)]] = -np.inf
    if x.max() == -np.inf:
        raise GptOssError(
            f"no token is allowed after {len(answer)} of the answer: the constraint, the bias and "
            "min_tokens together forbid all of them"
        )
    return x


def penalize(x: Floats, request: Request, answer: Sequence[int]) -> None:
    """Repetition penalty for tokens of prompt and answer (Keskar et al. 2019, "CTRL"), frequency
    and presence penalties for those of the answer."""
    if request.repetition_penalty != 1.0:
        seen = np.unique([t for t in (*request.prompt, *answer) if t < len(x)])
        with np.errstate(over="ignore"):
            old = x[seen]
            x[seen] = np.where(
                old > 0, old / request.repetition_penalty, old * request.repetition_penalty
            )
    if answer and (request.frequency_penalty or request.presence_penalty):
        tokens, counts = np.unique(answer, return_counts=True)
        x[tokens] -= counts * request.frequency_penalty + request.presence_penalty
