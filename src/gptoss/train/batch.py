"""Documents packed one after another: no padding, nobody sees his neighbour, positions restart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

IGNORE = -1  # a target that is not learned from


@dataclass(frozen=True, slots=True)
class Document:
    """What the model reads, and what it is to say after each token."""

    tokens: list[int]
    targets: list[int]  # as long as tokens; IGNORE where nothing is learned
    origin: str  # for messages: "chats.jsonl line 7"

    @property
    def trained(self) -> int:
        """Tokens that are learned from."""
        return sum(target != IGNORE for target in self.targets)


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents that are computed together: part of one step."""

    tokens: Tensor  # int [T]
    lengths: list[int]  # of the documents, one after another
    wanted: Tensor  # int [W], the tokens after which something is learned
    targets: Tensor  # int [W], what
    weights: Tensor  # float [W], how much each counts; of all batches of a step the sum is 1
    share: float  # of the step's tokens
    origin: str
    parts: int = 1  # that are computed apart, of which this is one

    def span(self, index: int, count: int) -> tuple[int, int]:
        """The tokens of one of ``count`` parts: whole documents, and about as many in each."""
        ends = list(accumulate(self.lengths))
        middles = [2 * end - n for end, n in zip(ends, self.lengths, strict=True)]
        mine = [i for i, at in enumerate(middles) if at * count // (2 * ends[-1]) == index]
        return (ends[mine[0]] - self.lengths[mine[0]], ends[mine[-1]]) if mine else (0, 0)

    def part(self, index: int, count: int) -> "Batch":
        """One of ``count`` parts. One without documents is a token that teaches nothing."""
        start, stop = self.span(index, count)
        said = (self.wanted >= start) & (self.wanted < stop)
        ends = list(accumulate(self.lengths))
        lengths = [n for n, end in zip(self.lengths, ends, strict=True) if start < end <= stop]
        return replace(
            self,
            tokens=self.tokens[start : max(stop, 1)],
            lengths=lengths or [1],
            wanted=self.wanted[said] - start,
            targets=self.targets[said],
            weights=self.weights[said],
            share=self.share * (stop - start) / len(self.tokens),
            parts=count,
        )

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        moved = {n: getattr(self, n).to(device) for n in ("tokens", "wanted", "targets", "weights")}
        return replace(self, **moved)


def collate(groups: Sequence[Sequence[Document]]) -> list[Batch]:
    """One step's documents -> its batches; every learned token of the step counts the same."""
    learned = sum(document.trained for group in groups for document in group)
    read = sum(len(document.tokens) for group in groups for document in group)
    batches = []
    for group in groups:
        tokens = torch.tensor([t for document in group for t in document.tokens])
        targets = torch.tensor([t for document in group for t in document.targets])
        wanted = (targets != IGNORE).nonzero().squeeze(1)
        batches.append(
            Batch(
                tokens=tokens,
                lengths=[len(document.tokens) for document in group],
                wanted=wanted,
                targets=targets[wanted],
                weights=torch.full((len(wanted),), 1.0 / max(1, learned)),
                share=len(tokens) / max(1, read),
                origin=", ".join(dict.fromkeys(document.origin for document in group)),
            )
        )
    return batches
