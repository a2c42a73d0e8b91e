"""Chosen steps of a training, recorded: what was read and learned, and every value on the way.

A batch is a trace; its documents stand one after another. Two runs that ought to be alike part at
the first step, token, layer and operation that differs. What a step's update got wrong is seen in
the values of the next.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptoss.model.reference import NDArray
from gptoss.verify.candidate import host
from gptoss.verify.record import Digest
from gptoss.verify.trace import TraceFile, joined
from gptoss.verify.traces import Writer

LOG = logging.getLogger("gptoss.trace")


class Steps:
    """``steps(step, batch)``: a ``Trace`` of a batch that is to be recorded, else None.

    Args:
        writer: of the file. A step that is recorded again, in a run that goes on, takes the place
            of what was.
        every: so-manieth step is recorded, from the first on.
        points: whose values are kept whole.
        about: goes into every header.
    """

    def __init__(
        self,
        writer: Writer,
        every: int = 1,
        points: Sequence[str] = (),
        **about: object,
    ) -> None:
        self.writer, self.every, self.points = writer, every, points
        self.about, self.over = about, False
        self._at = (-1, 0)  # the step, and how many of its batches were seen

    def __call__(self, step: int, batch: Any) -> "Batch | None":
        """``step`` counts from 0; what is written counts from 1, as the run's metrics do."""
        if self.over or step % self.every:
            return None
        self._at = (step, self._at[1] + 1 if self._at[0] == step else 0)
        return Batch(self, step + 1, self._at[1], batch)

    def write(self, trace: TraceFile, id: str) -> None:
        """A whole batch."""
        try:
            self.writer.add(trace, key=id, id=id)
        except OSError as error:
            self.over = True
            LOG.warning(
                "%s takes no more (%s); training goes on and is no longer recorded",
                self.writer.path,
                error.strerror,
            )


class Batch:
    """A ``Trace`` of one batch, written when its last value, ``scored``, was shown."""

    def __init__(self, steps: Steps, step: int, index: int, batch: Any) -> None:
        """``batch``: tokens [T], and of the W that are learned: wanted, targets, weights [W]."""
        self.steps, self.step, self.index, self.batch = steps, step, index, batch
        self.digest = Digest(steps.points)
        self.tokens, self.wanted = host(batch.tokens), host(batch.wanted)

    def __call__(self, name: str, x: Any) -> None:
        """See ``model.Trace``."""
        if name == "scored":
            self._end(host(x))
        elif name != "logits":  # in their place the loss has each token's own
            x = host(x)
            self.digest(name, x if len(x) == len(self.tokens) else self._spread(x, 0))

    def _spread(self, x: NDArray, empty: float) -> NDArray:
        """[W, ...] -> [T, ...]."""
        whole = np.full((len(self.tokens), *x.shape[1:]), empty, x.dtype)
        whole[self.wanted] = x
        return whole

    def _end(self, scored: NDArray) -> None:
        learned = {
            "targets": self._spread(host(self.batch.targets), -1),
            "weights": self._spread(host(self.batch.weights), 0),
            "scored": self._spread(scored, np.nan),
        }
        about = {
            "points": self.digest.names,
            "step": self.step,
            "lengths": [int(n) for n in self.batch.lengths],
            "origin": self.batch.origin,
        }
        arrays = joined([(0, {"tokens": self.tokens, **learned, **self.digest.arrays})])
        id = f"step-{self.step}" + (f".{self.index}" if self.index else "")
        self.steps.write(TraceFile({**self.steps.about, **about}, arrays), id)
