"""The conformance kit: texts that make every planted bug visible, and who it could have been.

A patient is any engine that continues a text greedily and says what it thought of the likeliest
tokens. Nothing else is asked of it, so the reference with a bug planted can be asked the same. The
bug whose answers are nearest to the patient's is the one that it may have; right is one of them.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gptoss.backends import load_backend
from gptoss.backends.protocol import Backend, Batch
from gptoss.checkpoint.save import save
from gptoss.errors import GptOssError
from gptoss.llm.models import NANO
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK, Packed
from gptoss.model.weights import Read, Spec, Stored, specs
from gptoss.text.tokenizer import Tokenizer
from gptoss.verify.mutants import BUGS, planted

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 130, 140, 170, 200, 260, 400, 600)
STEPS = 4  # tokens of each answer: they come one at a time, on another path than the prompt
TOP = 10  # candidates asked for at each; mlx-lm gives no more
RIGHT = "right"  # stands among the bugs for having none
SIGMAS = 5.0  # standard deviations of the noise by which an explanation must be worse to be out
FLOOR = 1e-5  # nats: float32's own noise
CAP = 0.2  # nats that one step counts at most: a near tie between experts may turn over
NEAR = 0.3  # of what half of the bugs make: an explanation so near is one

# The kit's own checkpoint: as in the released models, but what two layers can show.
PROBE = ModelConfig(
    num_hidden_layers=2,
    hidden_size=128,
    vocab_size=1024,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=8,
    experts_per_token=4,
    intermediate_size=128,
)
# Standard deviation (of matrices times sqrt(columns)) and mean, by the tail of the name: sinks that
# take probability, biases that matter, activations past the clamp, scores that are sharp.
VIVID = {
    "norm.scale": (0.1, 1.0),
    "attn.sinks": (2.0, 2.0),
    "attn.qkv.weight": (1.0, 0.0),
    "attn.out.weight": (1.0, 0.0),
    "mlp.gate.weight": (1.0, 0.0),
    "mlp.mlp1_weight": (4.0, 0.0),
    "mlp.mlp2_weight": (0.2, 0.0),
    "unembedding.weight": (2.0, 0.0),
    "embedding.weight": (11.0, 0.0),
    "mlp1_bias": (1.0, 0.0),
    "bias": (0.5, 0.0),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer."""

    token: int
    top: dict[int, float]  # what was thought of some candidates: token -> logprob


@dataclass(frozen=True, slots=True)
class Seen:
    """What a patient made of one text."""

    prompt: list[int]
    steps: list[Step]


Answers = npt.NDArray[np.float64]  # [S, C], logprobs of the candidates of each step; NaN: none
Patient = Callable[[list[int]], list[Step]]  # continues greedily, at most ``STEPS`` tokens


def probe_weights(config: ModelConfig = PROBE, seed: int = 0) -> Read:
    """Vivid tensors by canonical name, drawn when asked for."""
    table = {spec.name: spec for spec in specs(config)}
    order = {name: i for i, name in enumerate(table)}
    return lambda name: _vivid(table[name], np.random.default_rng([seed, order[name]]))


def _vivid(spec: Spec, rng: np.random.Generator) -> Stored:
    std, mean = next(size for tail, size in VIVID.items() if spec.name.endswith(tail))
    if len(spec.shape) > 1 and not spec.name.endswith("bias"):
        std /= spec.shape[-1] ** 0.5
    if spec.kind == "expert":
        groups = (*spec.shape[:-1], spec.shape[-1] // BLOCK)
        middle = 127 + round(np.log2(std / 2.9))  # 2.9: the standard deviation of the codes
        blocks = rng.integers(0, 256, (*groups, BLOCK // 2), np.uint8)
        return Packed(blocks, rng.integers(middle - 1, middle + 2, groups, np.uint8))
    x = rng.standard_normal(spec.shape, np.float32) * np.float32(std) + np.float32(mean)
    if spec.name == "embedding.weight":
        x[::3] *= np.float32(0.003)  # so small that the norm's epsilon counts
    narrow: npt.NDArray[Any] = x.astype(ml_dtypes.bfloat16)
    return narrow


def write_probe(path: Path | str, layout: str = "huggingface") -> Path:
    """The kit's checkpoint as files, with the vocabulary of nano. Errors as ``save``."""
    return save(PROBE, probe_weights(), path, layout, tokenizer_path=NANO / "tokenizer.json")


def prompts(tokenizer: Tokenizer, lengths: Sequence[int] = LENGTHS) -> list[str]:
    """Texts of so many tokens, the same every time; read back, they are the same tokens."""
    return [text for n in lengths for text in islice(_texts(tokenizer, n, n), 1)]


def _texts(tokenizer: Tokenizer, length: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    while True:
        text = "".join(draw.choices("etaoinshrdlucmfwyp0123456789     ", k=length))
        while len(tokens := tokenizer.encode(text)) < length:
            text += draw.choice("etaoinshrdlu ")
        if len(tokens) == length:
            yield text


def local(backend: Backend) -> Patient:
    """A backend as a patient."""

    def ask(prompt: list[int]) -> list[Step]:
        steps: list[Step] = []
        cache = backend.new_cache(max_tokens=len(prompt) + STEPS)
        slot, new, past = cache.open(), prompt, 0
        for _ in range(STEPS):
            logits = backend.to_numpy(backend.forward(Batch.of([new], [past], [slot]), cache))
            logprobs = log_softmax(logits[0])
            best = np.argsort(-logprobs, kind="stable")[:TOP].tolist()
            steps.append(Step(best[0], {t: float(logprobs[t]) for t in best}))
            new, past = [best[0]], past + len(new)
        return steps

    return ask


def answers(config: ModelConfig, read: Read, seen: Sequence[Seen], *bugs: str) -> Answers:
    """What the reference with these bugs says of the candidates that a patient has named."""
    with planted(*bugs), np.errstate(all="ignore"):  # some bugs overflow
        return said(load_backend("reference", config, read), seen)


def said(backend: Backend, seen: Sequence[Seen]) -> Answers:
    """A backend's own logprobs of the candidates of each step, in the order of rows and steps."""
    cache = backend.new_cache(max_tokens=sum(len(row.prompt) + STEPS for row in seen))
    slots = [cache.open() for _ in seen]
    found: dict[tuple[int, int], list[float]] = {}
    for step in range(max(len(row.steps) for row in seen)):
        here = [r for r, row in enumerate(seen) if step < len(row.steps)]
        new = [[seen[r].steps[step - 1].token] if step else seen[r].prompt for r in here]
        past = [len(seen[r].prompt) + step - 1 if step else 0 for r in here]
        logits = backend.forward(Batch.of(new, past, [slots[r] for r in here]), cache)
        for r, logprobs in zip(here, map(log_softmax, backend.to_numpy(logits)), strict=True):
            found[r, step] = logprobs[list(seen[r].steps[step].top)].tolist()
    return table([found[key] for key in sorted(found)])


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """[V] -> [V], in float64."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    return x


def distance(a: Answers, b: Answers) -> float:
    """Root mean square nats between two patients' logprobs."""
    return math.sqrt(_squares(a, b) / len(a))


def _squares(a: Answers, b: Answers) -> float:
    """Mean square nats of each step, at most ``CAP`` squared, summed over steps.

    The mean of a step's candidates is taken off: some engines leave padding out of their softmax.
    """
    apart = a - b
    with np.errstate(invalid="ignore"):
        apart = apart - np.nanmean(apart, axis=1, keepdims=True)
        each = np.nanmean(apart * apart, axis=1)
    return float(np.where(np.isfinite(each), np.minimum(each, CAP * CAP), CAP * CAP).sum())


def table(rows: Sequence[Sequence[float]]) -> Answers:
    """Rows of any length as one array, NaN where there is nothing."""
    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """How well the reference, right and with each bug, says what a patient said."""

    apart: dict[str, float]  # root mean square nats from it, the nearest first; RIGHT is no bug
    worse: dict[str, float]  # by how many standard deviations of the noise than the nearest
    typical: float  # nats that a bug makes: the median

    @property
    def fits(self) -> list[str]:
        """What cannot be told from the nearest."""
        return [name for name in self.apart if self.worse[name] < SIGMAS]

    @property
    def healthy(self) -> bool:
        """Being right is among what fits, and near."""
        return RIGHT in self.fits and self.apart[RIGHT] <= NEAR * self.typical

    @property
    def suspects(self) -> list[str]:
        """The bugs that explain it, and better than being right does, the best first."""
        return [] if RIGHT in self.fits or not self.explained else self.fits

    @property
    def explained(self) -> bool:
        """Whether the nearest is near."""
        return min(self.apart.values()) <= NEAR * self.typical

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        verdict = {"healthy": self.healthy, "explained": self.explained, "suspects": self.suspects}
        return {**verdict, "fits": self.fits, "nats": self.apart, "sigmas": self.worse}

    def __str__(self) -> str:
        right, best = self.apart[RIGHT], next(iter(self.apart))
        lines = [f"{right:.1e} nats from the reference; a bug makes {self.typical:.1e}"]
        if self.suspects:
            lines += [f"behaves as if: {name} ({self.apart[name]:.1e})" for name in self.suspects]
        elif self.healthy:
            lines += ["behaves as the reference does"]
            unseen = [name for name in self.fits if name != RIGHT]
            lines += [f"would not have been seen: {', '.join(unseen)}"] if unseen else []
        if not self.explained:
            lines += [f"no bug of the list explains it; the nearest: {best}"]
        return "\n".join(lines)


def judge(theirs: Answers, ours: dict[str, Answers]) -> Diagnosis:
    """``ours``: what the reference says with each bug, and under ``RIGHT`` as it is.

    The bug that leaves the least unexplained is taken for the patient's, and what it leaves for
    noise, of which another bug must be seen to leave more.
    """
    left = {name: _squares(theirs, said) for name, said in ours.items()}
    order = sorted(left, key=lambda name: (left[name], name != RIGHT))
    best = order[0]
    noise = max(math.sqrt(left[best] / len(theirs)), FLOOR)
    worse = {}
    for name in order:
        between = math.sqrt(_squares(ours[best], ours[name]))
        gap = math.sqrt(TOP) * (left[name] - left[best])
        worse[name] = gap / (2.0 * noise * between) if between else 0.0
    effects = [distance(ours[RIGHT], said) for name, said in ours.items() if name != RIGHT]
    apart = {name: math.sqrt(left[name] / len(theirs)) for name in order}
    return Diagnosis(apart=apart, worse=worse, typical=float(np.median(effects)))


def diagnose(
    config: ModelConfig,
    read: Read,
    patient: Patient,
    prompts: Iterable[list[int]],
    watch: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Ask the patient, then the reference with every bug.

    If a bug fits better than none, every other is tried beside it: engines may have two.

    Raises:
        GptOssError: the patient answers nothing or in other tokens, or as the patient raises.
    """
    seen = [Seen(prompt, patient(prompt)) for prompt in prompts]
    told = [[*step.top.values()] for row in seen for step in row.steps]
    if not told:
        raise GptOssError("not one probe was answered with log-probabilities")
    if any(not 0 <= t < config.vocab_size for row in seen for step in row.steps for t in step.top):
        raise GptOssError("the patient knows other tokens: it must run the same checkpoint")
    theirs = table(told)
    ours = {RIGHT: answers(config, read, seen)}
    for i, name in enumerate(BUGS):
        ours[name] = answers(config, read, seen, name)
        if watch is not None:
            watch(i + 1, len(BUGS))
    found = judge(theirs, ours)
    if RIGHT in found.fits:
        return found
    first = BUGS[found.fits[0]]
    for other in BUGS.values():
        if (other.module, other.right) == (first.module, first.right):
            continue
        with suppress(ValueError):  # the one has rewritten the other's passage
            ours[f"{first.name} + {other.name}"] = answers(
                config, read, seen, first.name, other.name
            )
    both = judge(theirs, ours)
    return both if both.worse[first.name] >= SIGMAS else found
