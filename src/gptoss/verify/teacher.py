"""Teacher forcing: how often two ways to run a model would have said the same word.

Both read the same text. What one of them expected after each token, its likeliest tokens with
their log-probabilities and what is left to all others, is small enough to be stored and compared
with elsewhere. The file is NumPy's .npz: ``tokens`` [T], ``ids`` and ``logprobs`` [T, K], ``rest``
[T] (log of what the K leave), ``next`` [T - 1] (logprob of the token that came), and ``about``,
one JSON object.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Backend, Batch
from gptoss.checkpoint.staged import staged_file
from gptoss.errors import GptOssError
from gptoss.model.config import ModelConfig
from gptoss.model.reference import NumpyOps
from gptoss.model.weights import Read
from gptoss.verify.layers import dense, layer_experts, load_block, run_layer, slices
from gptoss.verify.trace import DAMAGED

KEPT = 32  # likeliest tokens that are stored of each
STEP = 256  # tokens computed together
FORMAT = "gptoss-answers-1"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model expected after each token of a text."""

    tokens: npt.NDArray[np.int32]  # [T]
    ids: npt.NDArray[np.int32]  # [T, K], the likeliest first
    logprobs: Floats  # [T, K]
    rest: Floats  # [T], log of the probability of all others
    next: Floats  # [T - 1], logprob of the token that came
    about: dict[str, Any]  # whose they are

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return float(np.exp(-self.next.mean()))

    def save(self, path: Path | str) -> None:
        """Into a file; logprobs in float32. Raises GptOssError: it cannot be written."""
        arrays = {n: getattr(self, n).astype(np.float32) for n in ("logprobs", "rest", "next")}
        about = np.array(json.dumps({"format": FORMAT, **self.about}))
        with staged_file(Path(path)) as file:
            np.savez_compressed(file, tokens=self.tokens, ids=self.ids, about=about, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> "Answers":
        """Raises GptOssError for any other file."""
        with open(path, "rb") as raw, suppress(*DAMAGED), np.load(raw, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            logprobs, rest, following = (
                file[name].astype(np.float64) for name in ("logprobs", "rest", "next")
            )
            found = cls(file["tokens"], file["ids"], logprobs, rest, following, about)
            if about["format"] == FORMAT and found.ids.shape == found.logprobs.shape:
                return found
        raise GptOssError(f"{path}: holds no answers that `gptoss verify --save` has written")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How near one model's answers are to another's on the same text."""

    tokens: int
    top1: float  # how often the likeliest token is the same
    top5: float  # how often the other's likeliest is among the five likeliest
    kl: float  # nats, mean over tokens; all but the stored tokens count as one
    kl_max: float  # of one token
    at: int  # which token
    perplexity: float
    reference: float  # the other's perplexity


def table(found: Agreement) -> str:
    """For people."""
    return (
        f"{found.tokens} tokens: the same likeliest {found.top1:.2%}, among the five likeliest "
        f"{found.top5:.2%}\n"
        f"KL {found.kl:.2e} nats a token, most {found.kl_max:.2e} at token {found.at}\n"
        f"perplexity {found.perplexity:.6g}, the reference's {found.reference:.6g}"
    )


def ask(rows: Iterable[npt.NDArray[Any]], tokens: Sequence[int], about: dict[str, Any]) -> Answers:
    """Answers from pieces [n, V] of the logits behind each token."""
    ids, logprobs, rest, following = [], [], [], []
    text = np.asarray(tokens, np.int32)
    for x, here in _pieces(rows, len(text)):
        best = np.argsort(-x, axis=-1, kind="stable")[:, : min(KEPT, x.shape[1] - 1)]
        following.append(_following(x, text, here.start))
        ids.append(best.astype(np.int32))
        logprobs.append(np.take_along_axis(x, best, axis=-1))
        np.put_along_axis(x, best, -np.inf, axis=-1)
        rest.append(_log_sum(x))
    p, others, came = (np.concatenate(part) for part in (logprobs, rest, following))
    return Answers(text, np.concatenate(ids), p, others, came, about)


def run(backend: Backend, tokens: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
    """Logits of a text, some tokens at a time."""
    cache = backend.new_cache(max_tokens=len(tokens))
    slot = cache.open()
    for past in range(0, len(tokens), STEP):
        some = tokens[past : past + STEP]
        cache.reserve(slot, past + len(some))
        batch = Batch.of([some], [past], [slot], range(len(some)))
        yield backend.to_numpy(backend.forward(batch, cache))


def reference(config: ModelConfig, read: Read, tokens: Sequence[int]) -> Iterator[Floats]:
    """The same of the reference in float64, with one layer in memory."""
    x = dense(read, "embedding.weight")[np.asarray(tokens)].astype(np.float64)
    for layer in range(config.num_hidden_layers):
        experts = layer_experts(read, layer)
        block = load_block(read, layer, experts, np.float64)
        starts = np.array([0, len(tokens)])
        x = run_layer(block, layer, x, starts, config, NumpyOps())[f"block.{layer}"]
    x = NumpyOps().rms_norm(x, dense(read, "norm.scale").astype(np.float64), config.rms_norm_eps)
    unembedding = dense(read, "unembedding.weight")
    for past in range(0, len(tokens), STEP):
        some = x[past : past + STEP]
        parts = [some @ unembedding[rows].astype(np.float64).T for rows in slices(config)]
        yield np.concatenate(parts, axis=1)


def agreement(rows: Iterable[npt.NDArray[Any]], theirs: Answers) -> Agreement:
    """Pieces [n, V] of our logits for the same tokens, beside the answers of the reference."""
    kl: list[Floats] = []
    following: list[Floats] = []
    hits = np.zeros(2)
    for x, here in _pieces(rows, len(theirs.tokens)):
        ids, p = theirs.ids[here], theirs.logprobs[here]
        q = np.take_along_axis(x, ids, axis=-1)
        np.put_along_axis(x, ids, -np.inf, axis=-1)
        apart = (np.exp(p) * (p - q)).sum(axis=-1)
        left = np.exp(theirs.rest[here])
        kl.append(apart + np.where(left > 0, left * (theirs.rest[here] - _log_sum(x)), 0.0))
        np.put_along_axis(x, ids, q, axis=-1)
        rank = (x > q[:, :1]).sum(axis=-1)  # of the reference's likeliest, among ours
        hits += [(rank < 1).sum(), (rank < 5).sum()]
        following.append(_following(x, theirs.tokens, here.start))
    each = np.concatenate(kl)
    return Agreement(
        tokens=len(each),
        top1=float(hits[0] / len(each)),
        top5=float(hits[1] / len(each)),
        kl=float(each.mean()),
        kl_max=float(each.max()),
        at=int(each.argmax()),
        perplexity=float(np.exp(-np.concatenate(following).mean())),
        reference=theirs.perplexity,
    )


def _pieces(rows: Iterable[npt.NDArray[Any]], length: int) -> Iterator[tuple[Floats, slice]]:
    """Logprobs in float64, and of which tokens they are."""
    at = 0
    for logits in rows:
        x = logits.astype(np.float64)
        x -= _log_sum(x)[:, None]
        yield x, slice(at, at + len(x))
        at += len(x)
    assert at == length, f"logits of {at} tokens, not {length}"


def _log_sum(x: Floats) -> Floats:
    largest = x.max(axis=-1)
    with np.errstate(divide="ignore"):
        total: Floats = largest + np.log(np.exp(x - largest[:, None]).sum(axis=-1))
    return total


def _following(x: Floats, tokens: npt.NDArray[np.int32], at: int) -> Floats:
    """Logprobs of the tokens that came behind those at ``at`` and after it."""
    after = tokens[at + 1 : at + 1 + len(x)]
    found: Floats = x[np.arange(len(after)), after]
    return found
