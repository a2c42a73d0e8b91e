"""Answers that are chosen when all are known: the best of several, and beam search."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gptoss.engine.draw import likeliest
from gptoss.engine.request import Request
from gptoss.engine.row import Row
from gptoss.engine.stream import Drawn, Finish, Stream


@dataclass(frozen=True, slots=True)
class Found:
    """A whole answer."""

    score: float
    drawn: list[Drawn]
    finish: Finish


def hand_out(stream: Stream, found: Iterable[Found]) -> None:
    """The n best of ``found``, best first, to who asked; of equals the first found."""
    best = sorted(found, key=lambda f: -f.score)[: stream.request.n]
    for answer, f in zip(stream.answers, best, strict=False):
        answer.score, answer.finish = f.score, f.finish
    for i, f in enumerate(best):
        for drawn in f.drawn:
            stream.put(replace(drawn, row=i))
    stream.end(best[0].finish)


class Best:
    """Of answers that were drawn: those of highest mean logprob."""

    def __init__(self, request: Request) -> None:
        self.left, self.found = request.rows, list[Found]()

    def add(self, row: Row, finish: Finish) -> bool:
        """One more is whole. True: that was the last."""
        self.found.append(Found(row.score / len(row.drawn), row.drawn, finish))
        self.left -= 1
        return not self.left


class Beams:
    """The ``beams`` likeliest beginnings, each time extended by every token, and the best again.

    An end is scored by sum of logprobs / length ** length_penalty. It is over when no beginning
    can end better than the n best ends known, or all have reached their limit.
    """

    def __init__(self, request: Request, limit: int) -> None:
        """``limit``: longest answer in tokens."""
        self.request, self.limit = request, limit
        self.live: list[Row] = []
        self.offers: dict[Row, list[tuple[int, float]]] = {}
        self.found: list[Found] = []

    def offer(self, row: Row, logprobs: npt.NDArray[np.float64]) -> bool:
        """What may come next in one of them. True: all have said so."""
        self.offers[row] = likeliest(logprobs, self.request.beams + len(self.request.stop_tokens))
        row.ready = True
        return len(self.offers) == len(self.live)

    def advance(self) -> list[tuple[Row, Drawn]]:
        """Which beginnings live on, and by which token; empty: it is over."""
        pool = [
            (row.score + logprob, row, Drawn(token, logprob))
            for row, offer in self.offers.items()
            for token, logprob in offer
            if logprob > -float("inf")
        ]
        self.offers.clear()
        kept: list[tuple[Row, Drawn]] = []
        for score, row, drawn in sorted(pool, key=lambda c: (-c[0], c[1].index, c[2].token)):
            finish = self._finish(row, drawn)
            if finish is not None:
                whole = [*row.drawn, drawn]
                self.found.append(Found(self._at(score, len(whole)), whole, finish))
            elif len(kept) < self.request.beams:
                kept.append((row, drawn))
        self.found = sorted(self.found, key=lambda f: -f.score)[: self.request.beams]
        return kept if kept and not self._settled(kept) else []

    def _finish(self, row: Row, drawn: Drawn) -> Finish | None:
        if drawn.token in self.request.stop_tokens:
            return "stop"
        return "length" if len(row.drawn) + 1 >= self.limit else None

    def _at(self, score: float, length: int) -> float:
        return score / float(length**self.request.length_penalty)

    def _settled(self, kept: list[tuple[Row, Drawn]]) -> bool:
        """Whether the likeliest beginning, at the length that suits it best, comes too late."""
        if len(self.found) < self.request.n:
            return False
        row, drawn = kept[0]
        assert drawn.logprob is not None
        length = self.limit if self.request.length_penalty > 0 else len(row.drawn) + 2
        best = self._at(row.score + drawn.logprob, length)
        return best <= self.found[self.request.n - 1].score
