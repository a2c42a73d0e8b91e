"""A trace: what happened at every token, small enough to keep.

The file is NumPy's .npz. T tokens, L layers, k experts a token, H heads, C candidates, P points:

    tokens [T]            int32
    came [T]              logprob of the token after those before it (NaN for the first)
    ids, logprobs [T, C]  the likeliest tokens behind each
    chosen, share [T, L, k]  experts and their shares
    sink [T, L, H]        the part of each head's attention that its sink takes (NaN: not known)
    sketch [T, P, 5]      of every trace point, its root mean square and four projections on fixed
                          random signs, whose differences are as large as those of the values
    point/NAME [T, ...]   values themselves, of the points that were asked for
    about                 one JSON object: format, model, backend, config, prompt, points (names)

Of a batch that was trained on there are, in place of came, ids, logprobs and sink:

    targets [T]           what is learned after each token (-1: nothing)
    weights [T]           how much that counts in the step's loss
    scored [T]            its logprob (NaN: nothing is learned)

Many traces in one file are those of ``traces.py``.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptoss.checkpoint.staged import staged_file
from gptoss.errors import GptOssError
from gptoss.model.reference import NDArray

FORMAT = "gptoss-trace-1"
# What reading an .npz may raise that is damaged, or another kind of file; of RuntimeError, what an
# archive says that seems to be encrypted or of a later kind.
DAMAGED = (
    *(ValueError, KeyError, TypeError, EOFError, OSError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
Part = tuple[int, dict[str, NDArray]]  # where it begins, and arrays of the tokens from there on
NARROW = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}


# The trace points of ``model/model.py``, and those of each of its layers.
POINTS = ("embedding", "norm", "logits")
LAYER = (
    *(f"attn.{name}" for name in ("norm", "q", "k", "v", "mixed", "out")),
    *("attn", "mlp.norm", "mlp.gate", "mlp.chosen", "mlp.share", "mlp.out"),
)


def is_point(name: str) -> bool:
    """Whether a trace point is called so, of one layer (``block.3.attn.q``) or all (``attn.q``)."""
    layer = re.fullmatch(r"block\.\d+(?:\.(.+))?", name)
    return (layer[1] or "attn") in LAYER if layer else name in (*POINTS, *LAYER)


@dataclass(frozen=True, eq=False)
class TraceFile:
    """One trace."""

    about: dict[str, Any]
    arrays: dict[str, NDArray]

    @property
    def tokens(self) -> list[int]:
        """What was read."""
        return [int(token) for token in self.arrays["tokens"]]

    def save(self, path: Path | str) -> None:
        """Into a file of its own. Raises GptOssError: it cannot be; what was there stays."""
        with staged_file(Path(path)) as file:
            self.write(file)

    def write(self, file: IO[bytes]) -> None:
        """The same into an open file."""
        about = np.array(json.dumps({"format": FORMAT, **self.about}))
        np.savez_compressed(file, about=about, **self.arrays)

    @classmethod
    def load(cls, path: Path | str) -> "TraceFile":
        """Raises GptOssError for any other file."""
        with open(path, "rb") as file:
            return cls.read(file, str(path))

    @classmethod
    def read(cls, file: IO[bytes], origin: str) -> "TraceFile":
        """The same from an open file; ``origin`` is what an error calls it."""
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
            about = json.loads(str(arrays.pop("about")))
            shape = len(arrays["tokens"]), len(about["points"]), 5
            if about.pop("format") == FORMAT and arrays["sketch"].shape == shape:
                return cls(about, arrays)
        except DAMAGED:
            pass
        raise GptOssError(f"{origin}: is no trace that gptoss has written")


def joined(parts: Iterable[Part]) -> dict[str, NDArray]:
    """Parts as one; of tokens that were computed again, the last counts.

    Raises:
        ValueError: there are none, or what is before one of them is missing.
    """
    kept: list[Part] = []
    for start, arrays in parts:
        while kept and kept[-1][0] >= start:
            kept.pop()
        if kept:
            first, before = kept.pop()
            kept.append((first, {name: x[: start - first] for name, x in before.items()}))
        end = kept[-1][0] + len(kept[-1][1]["tokens"]) if kept else start
        if end != start:
            raise ValueError(f"tokens {end} to {start} are missing")
        kept.append((start, arrays))
    if not kept:
        raise ValueError("there are no parts")
    whole = {name: np.concatenate([arrays[name] for _, arrays in kept]) for name in kept[0][1]}
    return {name: x.astype(NARROW.get(x.dtype, x.dtype)) for name, x in whole.items()}
