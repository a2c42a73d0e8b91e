"""Reading all the data before a step is spent on them: the first bad line, and what is there."""

from collections.abc import Callable
from dataclasses import dataclass

from gptoss.train.corpus import Corpus


@dataclass(frozen=True, slots=True)
class Contents:
    """What the files hold."""

    lines: int
    documents: int
    tokens: int
    trained: int  # tokens that are learned
    longest: int  # tokens of the longest document

    def __str__(self) -> str:
        read = ((self.lines, "line"), (self.documents, "document"), (self.tokens, "token"))
        counted = ", ".join(f"{n:,} {name}{'s' * (n != 1)}" for n, name in read)
        return f"{counted}, {self.trained:,} of them learned, {self.longest:,} in the longest"


def lint(corpus: Corpus, watch: Callable[[int, int], None] | None = None) -> Contents:
    """Render every line. Raises TrainingError naming the first bad one; ``watch``: done, in all."""
    documents = tokens = trained = longest = 0
    for index in range(len(corpus)):
        for document in corpus.line(index):
            documents += 1
            tokens += len(document.tokens)
            trained += document.trained
            longest = max(longest, len(document.tokens))
        if watch is not None:
            watch(index + 1, len(corpus))
    return Contents(len(corpus), documents, tokens, trained, longest)
