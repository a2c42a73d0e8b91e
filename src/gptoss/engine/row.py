"""One sequence on its way: its tokens, and how much of them the cache holds."""

from typing import TYPE_CHECKING

from gptoss.engine.draw import derived, is_plain
from gptoss.engine.request import Request
from gptoss.engine.speculate import Lookup
from gptoss.engine.stream import Drawn, Stream

if TYPE_CHECKING:
    from gptoss.engine.search import Beams, Best


class Row:
    """Prompt and answer so far. Invariant: ``tokens[:held]`` is what ``slot`` holds, and at least
    one token is not held, for the next is drawn from the logits behind the last.

    Args:
        stream: where its tokens go.
        arrival: when its request came; the smaller, the sooner it is served.
        limit: longest that prompt and answer may get.
        index: which of the request's sequences it is.
    """

    __slots__ = (
        *("arrival", "constraint", "drawn", "held", "index", "limit", "lookup", "lost", "plain"),
        *("ready", "request", "room", "score", "search", "seed", "slot", "split", "start"),
        *("stream", "tokens"),
    )

    def __init__(
        self,
        stream: Stream,
        arrival: int,
        limit: int,
        index: int = 0,
        search: "Best | Beams | None" = None,
    ) -> None:
        request: Request = stream.request
        self.stream, self.request, self.arrival, self.index = stream, request, arrival, index
        self.tokens, self.start, self.limit = list(request.prompt), len(request.prompt), limit
        self.search = search
        self.slot: int | None = None
        self.held = self.room = 0  # tokens held; tokens reserved
        self.lost = 0  # tokens that were held when its room was taken away
        self.seed = derived(request.seed, index)
        self.constraint = None if request.constraint is None else request.constraint.fork()
        self.plain = is_plain(request)
        self.lookup = Lookup() if request.speculate and not request.beams else None
        self.split = request.rows == 1 or request.beams > 0  # no siblings to come from it
        self.ready = False  # a beam that waits for the others; it needs no step
        self.score = 0.0  # sum of logprobs, where somebody asked
        self.drawn: list[Drawn] = []  # the answer, where it is not handed out at once

    @property
    def order(self) -> tuple[int, int]:
        """Smaller ones first."""
        return self.arrival, self.index

    @property
    def pending(self) -> int:
        """Tokens that the cache does not hold yet."""
        return len(self.tokens) - self.held

    @property
    def over(self) -> bool:
        """Whether its request has ended, or its answer of several."""
        stream = self.stream
        alone = self.search is None and stream.answers[self.index].finish is not None
        return alone or stream.finish is not None

    @property
    def answer(self) -> list[int]:
        """Tokens drawn."""
        return self.tokens[self.start :]

    def sibling(self, index: int) -> "Row":
        """The same so far, without a slot."""
        new = Row(self.stream, self.arrival, self.limit, index, self.search)
        new.tokens, new.held, new.score = list(self.tokens), 0, self.score
        new.drawn, new.split = list(self.drawn), True
        new.constraint = None if self.constraint is None else self.constraint.fork()
        return new
