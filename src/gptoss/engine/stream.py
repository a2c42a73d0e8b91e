"""An answer as it comes: tokens to iterate over, and what became of it."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from gptoss.engine.request import Request

LOG = logging.getLogger(__name__)
Finish = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token of an answer, or of a prompt."""

    token: int
    logprob: float | None  # of the model itself: before penalties and filters; None: not asked
    top: tuple[tuple[int, float], ...] = ()  # the likeliest (token, logprob), likeliest first
    row: int = 0  # which of the n answers it belongs to


Listener = Callable[[Drawn | None], None]


@dataclass(slots=True)
class Answer:
    """One of the n answers to a request."""

    drawn: list[Drawn] = field(default_factory=list)
    finish: Finish | None = None  # None: still being drawn
    score: float | None = None  # best_of: mean logprob; beams: by length_penalty; else None

    @property
    def tokens(self) -> list[int]:
        """All so far, the stop token included."""
        return [d.token for d in self.drawn]


class Stream:
    """Iterate over ``Drawn``s. Those of n answers come mixed, each with its ``row``.

    Of best_of and beams, nothing comes before everything is over. Iterating drives the engine,
    unless a worker's thread does; then it waits. An error is raised behind the last token. Who
    stops reading before the end calls ``cancel``, or uses ``with``.
    """

    def __init__(
        self,
        request: Request,
        pull: Callable[[], object],
        cancel: Callable[["Stream", int | None], None],
        listener: Listener | None = None,
    ) -> None:
        """``pull`` returns when there may be news; ``cancel``, ``listener``: see ``Engine``."""
        self.request = request
        self.answers = [Answer() for _ in range(request.n)]
        self.prompt_logprobs: list[Drawn] = []  # of prompt[1:], if they were asked for
        self.finish: Finish | None = None  # of the last answer to end; None: running
        self.error: Exception | None = None  # why, if finish is "error"
        self.prompt = len(request.prompt)
        self.reused = 0  # tokens of the prompt that an earlier request had computed
        self.recomputed = 0  # tokens computed again because others needed the room
        self.completion = 0  # tokens drawn, those that best_of and beams dropped included
        self.drafted = self.accepted = 0  # tokens guessed by speculation; those that were right
        self._pull, self._cancel, self._listener = pull, cancel, listener
        self._unread: deque[Drawn] = deque()

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        while True:
            over = self.finish is not None  # asked first: nothing comes after it
            if self._unread:
                return self._unread.popleft()
            if over and self.error is not None:
                raise self.error
            if over:
                raise StopIteration
            self._pull()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End it now, with what there is; nothing happens if it has ended."""
        if self.finish is None:
            self._cancel(self, None)

    def stop(self, answer: int) -> None:
        """End one of the n answers with finish "stop": who reads it has what it wanted.

        Of ``best_of`` and beams, which answer is which is not known before the end.
        """
        if self.finish is None:
            self._cancel(self, answer)

    def put(self, drawn: Drawn) -> None:
        """The engine's: one more token."""
        self.answers[drawn.row].drawn.append(drawn)
        self._unread.append(drawn)
        if self._listener is not None:
            self._listener(drawn)  # if it raises, the engine ends the request with that

    def end(self, finish: Finish, error: Exception | None = None) -> None:
        """The engine's: nothing follows. Answers that have not ended end so."""
        for answer in self.answers:
            answer.finish = answer.finish or finish
        self.error, self.finish = error, finish
        if self._listener is not None:
            try:
                self._listener(None)
            except Exception:  # nobody is left to be told
                LOG.warning("the listener of a request failed at its end", exc_info=True)
