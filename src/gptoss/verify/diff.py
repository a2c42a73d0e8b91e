"""Where two traces part: the first token, layer and operation whose value is another."""

from dataclasses import dataclass

import numpy as np

from gptoss.model.reference import NDArray
from gptoss.verify.trace import TraceFile

LOSS = "the loss"  # stands among the points where a batch was trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Where two traces part."""

    length: int  # tokens compared
    tokens: int | None  # the first that is another token, in length or in kind; None: none is
    token: int | None  # the first at which some value is another; None: none is
    point: str | None  # the first trace point at that token
    size: float  # of the difference there, relative to the value
    likeliest: int | None  # the first token behind which another is the likeliest

    @property
    def same(self) -> bool:
        """Whether they do not."""
        return self.token is None and self.tokens is None


def diff(a: TraceFile, b: TraceFile, tolerance: float = 1e-3) -> Parting:
    """The first token, layer and operation at which b is not a.

    Raises:
        ValueError: they have no trace points in common.
    """
    names = [name for name in a.about["points"] if name in set(b.about["points"])]
    if not names:
        raise ValueError("the traces have no points in common: they are of two different models")
    n = min(len(a.tokens), len(b.tokens))
    relative = _relative(a, b, names, n)
    if "scored" in a.arrays and "scored" in b.arrays:
        names, relative = [*names, LOSS], np.column_stack([relative, _learned(a, b, n)])
    wrong = ~(relative <= tolerance)
    token = _first(wrong.any(axis=1))
    point = None if token is None else int(wrong[token].argmax())
    other = [i for i in range(n) if a.tokens[i] != b.tokens[i]]
    longer = [n] if len(a.tokens) != len(b.tokens) else []
    both = "ids" in a.arrays and "ids" in b.arrays
    return Parting(
        length=n,
        tokens=next(iter(other + longer), None),
        token=token,
        point=None if point is None else names[point],
        size=0.0 if token is None or point is None else float(relative[token, point]),
        likeliest=_first(a.arrays["ids"][:n, 0] != b.arrays["ids"][:n, 0]) if both else None,
    )


def _relative(a: TraceFile, b: TraceFile, names: list[str], n: int) -> NDArray:
    """[n, P]: by how much of its size each value differs; NaN is like NaN alone."""
    x, y = (t.arrays["sketch"][:n, [t.about["points"].index(i) for i in names]] for t in (a, b))
    size = np.maximum(x[..., 0], y[..., 0])
    with np.errstate(invalid="ignore"):
        apart = np.sqrt(np.mean((x - y)[..., 1:].astype(np.float64) ** 2, axis=-1))
    alike = ((x == y) | (np.isnan(x) & np.isnan(y))).all(axis=-1)
    same = alike | _left_out(a, x) | _left_out(b, y)
    found: NDArray = np.where(same, 0.0, apart / np.where(size > 0, size, 1.0))
    return found


def _left_out(trace: TraceFile, sketch: NDArray) -> NDArray:
    """[n, P]: what a training did not compute, of tokens after which nothing is learned."""
    if "targets" not in trace.arrays:
        return np.zeros(sketch.shape[:2], bool)
    learned = trace.arrays["targets"][: len(sketch), None] >= 0
    unseen: NDArray = ~learned & ~sketch.any(axis=-1)
    return unseen


def _learned(a: TraceFile, b: TraceFile, n: int) -> NDArray:
    """[n]: by how many nats the loss of each token differs; infinite where another is learned."""
    x, y = (np.nan_to_num(t.arrays["scored"][:n].astype(np.float64)) for t in (a, b))
    same = a.arrays["targets"][:n] == b.arrays["targets"][:n]
    alike = np.isclose(a.arrays["weights"][:n], b.arrays["weights"][:n], rtol=1e-5, atol=0.0)
    return np.where(same & alike, np.abs(x - y), np.inf)


def _first(wrong: NDArray) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None
