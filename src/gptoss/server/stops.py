"""Strings that end an answer, found although tokens cut them anywhere."""

from collections.abc import Sequence

from gptoss.engine import Drawn

Carried = tuple[Drawn, ...]


class StopStrings:
    """Text goes in piece by piece and comes out as soon as it cannot begin a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found: str | None = None  # nothing comes out behind it
        self._held: list[tuple[str, Carried]] = []

    def feed(self, text: str, drawn: Carried = ()) -> tuple[str, Carried]:
        """The text that is certain by now, with the tokens that begin in it."""
        self._held.append((text, drawn))
        whole = "".join(text for text, _ in self._held)
        found = [(at + len(s), at, s) for s in self.stops if (at := whole.find(s)) >= 0]
        if found:  # the first to be complete counts, however tokens cut the text
            _, at, self.found = min(found)
            return self._release(at, last=True)
        return self._release(len(whole) - self._promising(whole))

    def flush(self) -> tuple[str, Carried]:
        """What was held back; the text is over."""
        return self._release(sum(len(text) for text, _ in self._held), last=True)

    def _promising(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        most = min(len(text), max(map(len, self.stops), default=1) - 1)
        ends = (n for n in range(most, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops))
        return next(ends, 0)

    def _release(self, count: int, *, last: bool = False) -> tuple[str, Carried]:
        """The first ``count`` characters; ``last``: the others are forgotten."""
        out: list[str] = []
        drawn: list[Drawn] = []
        while self._held and (count or not self._held[0][0]):
            text, carried = self._held.pop(0)
            out.append(text[:count])
            drawn += carried
            if len(text) > count:
                self._held.insert(0, (text[count:], ()))
            count -= min(count, len(text))
        if last:
            self._held.clear()
        return "".join(out), tuple(drawn)
