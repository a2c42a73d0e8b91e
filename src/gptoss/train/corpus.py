"""Files of JSON lines, larger than memory, in an order that only the seed decides.

What is held in memory is where each line begins, its number, and this epoch's order: 24 bytes. A
line is read, parsed and rendered when its turn comes, so going on at any position costs nothing.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.errors import TrainingError
from gptoss.train.batch import Batch, Document, collate

BLOCK = 1 << 24  # bytes read at a time while looking for lines
LONGEST = 1 << 28  # bytes of one line
Render = Callable[[Any, str], list[Document]]  # a line's JSON and its origin


class Corpus:
    """Lines of one or more files; empty ones do not count.

    Raises:
        TrainingError: a file cannot be read, or there is no line in any.
    """

    def __init__(self, paths: Sequence[Path | str], render: Render, seed: int = 0) -> None:
        self.paths, self.render, self.seed = [Path(path) for path in paths], render, seed
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        found = [_lines(path) for path in self.paths]
        self._starts, self._numbers = [x[0] for x in found], [x[1] for x in found]
        self._firsts = np.cumsum([0, *map(len, self._starts)])
        self.checksums = [x[2] for x in found]  # changed data are another run
        if not len(self):
            raise TrainingError(f"{', '.join(map(str, self.paths))}: there is no line in it")

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def line(self, index: int) -> list[Document]:
        """The documents of a line. Raises TrainingError naming it."""
        file = int(np.searchsorted(self._firsts, index, side="right")) - 1
        here = index - self._firsts[file]
        with self.paths[file].open("rb") as opened:
            opened.seek(int(self._starts[file][here]))
            raw = opened.readline(LONGEST)
        origin = f"{self.paths[file]} line {self._numbers[file][here]}"
        try:
            return self.render(json.loads(raw.decode("utf-8")), origin)
        except RecursionError:
            raise TrainingError(f"{origin}: JSON nested too deeply") from None
        except json.JSONDecodeError as error:
            raise TrainingError(f"{origin}: not valid JSON ({error.msg}, {error.pos})") from None
        except UnicodeDecodeError as error:
            raise TrainingError(f"{origin}: not UTF-8 text (byte {error.start})") from None
        except ValueError as error:
            raise TrainingError(f"{origin}: {error}") from None

    def at(self, place: int) -> list[Document]:
        """The line at a place of the endless order: every epoch is another permutation."""
        epoch, index = divmod(place, len(self))
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = (epoch, generator.permutation(len(self)))
        return self.line(int(self._order[1][index]))

    def draw(
        self, position: list[int] | None, *, tokens: int, batches: int
    ) -> tuple[list[Batch], list[int]]:
        """The batches of one step, each of at most so many tokens, and the position after them.

        A position is a place in the order and the documents of its line that have been used.
        """
        place, used = position or [0, 0]
        groups: list[list[Document]] = []
        for _ in range(batches):
            group: list[Document] = []
            room = tokens
            while True:
                left = self.at(place)[used:]
                fitting = _fitting(left, room)
                group += left[:fitting]
                room -= sum(len(document.tokens) for document in left[:fitting])
                if fitting < len(left):
                    used += fitting
                    break
                place, used = place + 1, 0
            groups.append(group)
        return collate(groups), [place, used]


def _fitting(documents: Sequence[Document], room: int) -> int:
    """How many of the documents, from the first on, fit together."""
    for count, document in enumerate(documents):
        room -= len(document.tokens)
        if room < 0:
            return count
    return len(documents)


def _lines(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], str]:
    """Where each line that is not empty begins, its number from 1 on, and the file's checksum."""
    ends, checksum, size, last = [], 0, 0, b"\n"
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
                checksum, size, last = zlib.crc32(block, checksum), size + len(block), block[-1:]
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror}") from None
    breaks = np.concatenate([[-1], *ends, *([] if last == b"\n" else [[size]])]).astype(np.int64)
    full = np.flatnonzero(np.diff(breaks) > 1)  # "\r" alone is for the parser to refuse
    return breaks[full] + 1, full + 1, f"{checksum:08x}"
