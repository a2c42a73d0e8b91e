"""Guesses from the sequence's own past: what followed the last time these tokens came?

Saxena 2023, "Prompt lookup decoding". A guess is right when it is what would have been drawn, so
guessing changes how many tokens a step yields and never which.
"""

from collections.abc import Sequence

GRAM = 5  # tokens that must have come before; after three, most guesses of the nano model fail
MOST = 8  # tokens guessed at once
CROWD = 4  # with more sequences in a step the arithmetic, not the weights' way, is what costs


class Lookup:
    """One sequence's n-grams, and how far its guesses can be trusted."""

    def __init__(self) -> None:
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its last coming
        self.known = GRAM  # n-grams that end here or before are in ``follows``
        self.width = 2  # tokens guessed next time
        self.rest = self.fine = 0  # guesses to leave out; how many the next failure costs

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow ``tokens``, at most ``most``; often nothing."""
        for i in range(self.known, len(tokens)):
            self.follows[tuple(tokens[i - GRAM : i])] = i
        self.known = max(self.known, len(tokens))
        at = self.follows.get(tuple(tokens[-GRAM:]))
        if at is None or most <= 0:
            return []
        if self.rest:
            self.rest -= 1
            return []
        return list(tokens[at : at + min(self.width, most)])

    def judge(self, drafted: int, accepted: int) -> None:
        """Longer guesses after right ones; fewer and fewer where less than half is right.

        A wrong guess is not free: its token visits experts of its own.
        """
        if accepted == drafted:
            self.width, self.fine = min(2 * self.width, MOST), self.fine // 2
        elif 2 * accepted >= drafted:
            self.width = max(2, accepted)
        else:
            self.width, self.fine = 2, min(2 * self.fine + 1, 63)
            self.rest = self.fine
