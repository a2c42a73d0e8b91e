"""Layer by layer, token by token: a backend against the reference in float64.

Isolated, each layer gets the reference's input, so what is wrong in it is wrong there. Propagated,
the whole model runs as it does in life, and errors add up. Stepwise, the last tokens of each text
come one by one, on the cache of the others.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptoss.verify.candidate import Candidate, forward, host, stepwise
from gptoss.verify.findings import See
from gptoss.verify.judge import MODES, Judge
from gptoss.verify.layers import Points

LAST = 4  # tokens of each text that are also computed one by one


def verify(
    candidate: Candidate,
    texts: Sequence[Sequence[int]],
    see: See,
    *,
    against: Candidate | None = None,
    modes: Sequence[str] = MODES,
) -> None:
    """Compare at every trace point, in the order of the model; each text is a row of tokens.

    Args:
        see: is given each finding as soon as it is there.
        against: another backend in the reference's place, which then follows nobody's routing.
    """
    rows = [np.asarray(text, np.int32) for text in texts]
    judge = Judge(candidate, against, rows, see, isolated="isolated" in modes)
    if "propagated" not in modes:
        judge.embedding(None)
        for layer in range(candidate.config.num_hidden_layers):
            judge.layer(layer, None)
        judge.head(None, None)
        return
    own: Points = {}

    def trace(name: str, x: Any) -> None:
        own[name] = host(x)
        if name == "embedding":
            judge.embedding(own.pop(name))
        elif name.count(".") == 1:  # block.N: the layer is complete
            judge.layer(int(name.removeprefix("block.")), own)
            own.clear()

    backend = candidate.open()
    logits = forward(backend, rows, range(sum(map(len, rows))), trace)
    judge.head(own["norm"], logits)
    judge.steps(*stepwise(backend, rows, min(LAST, *map(len, rows))), logits)


def texts(vocabulary: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random tokens, the same every time."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocabulary, n).tolist() for n in lengths]
