"""One traced forward over a whole conversation, and what is kept of it.

Everything is told by *step*: step p reads token p and expects token p + 1. Any backend that traces
will do. Attention is kept as each head's share for the sink, its strongest source, and others as
far as there is room: a long conversation in a large model has too many for a page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gptoss.backends.protocol import Backend, Batch
from gptoss.engine.draw import check_finite
from gptoss.errors import ContextExceeded
from gptoss.model.config import ModelConfig
from gptoss.model.reference import NDArray, unpack
from gptoss.model.weights import Read
from gptoss.sight.attention import LEAST, attention_weights, strongest, threshold
from gptoss.sight.lens import Lens, Reading, read_logits

STEP = 128  # tokens traced together: bounds what a trace takes
ALTERNATIVES, LENS, SOURCES = 10, 5, 8  # kept of each step, layer, head
WEIGHTS = 840_000  # of attention, kept in all; 500 tokens x 24 layers x 64 heads are 768,000
LONGEST = 1 << 16  # tokens; a source's place is kept in 16 bits
Progress = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True, slots=True)
class Sources:
    """Where one layer's heads looked."""

    sink: NDArray  # [T, H], the share that went nowhere
    weight: NDArray  # [T, H, SOURCES], strongest first, 0 where less was kept
    where: NDArray  # int [T, H, SOURCES], the tokens looked at


@dataclass(frozen=True, slots=True)
class Sight:
    """A conversation as the model saw it: T steps."""

    config: ModelConfig
    tokens: NDArray  # int [T]
    expected: Reading  # of the T steps
    lens: list[Reading]  # the same for each layer's residual
    attention: list[Sources]  # for each layer
    chosen: NDArray  # int [T, layers, k], experts, best first
    share: NDArray  # [T, layers, k]


def look(
    backend: Backend, read: Read, tokens: Sequence[int], progress: Progress | None = None
) -> Sight:
    """Run the tokens and keep what can be seen.

    Args:
        read: tensors by canonical name: the sinks, the final norm and the unembedding are asked.
        progress: is called after each part.

    Raises:
        ValueError: no tokens, or one that is not in the vocabulary.
        ContextExceeded: more than the model's context, or a page, holds.
        GptOssError: logits are NaN.
    """
    if not len(tokens):
        raise ValueError("there are no tokens to look at")
    most = min(LONGEST, backend.config.context_length)
    if len(tokens) > most:
        raise ContextExceeded(
            f"{len(tokens)} tokens cannot be looked at together; at most {most}, of the model's "
            f"context of {backend.config.context_length}"
        )
    kept = _Recorder(backend, read)
    cache = backend.new_cache(max_tokens=len(tokens))
    slot = cache.open()
    cache.reserve(slot, len(tokens))
    for past in range(0, len(tokens), STEP):
        chunk = tokens[past : past + STEP]
        came = np.array([*tokens[past + 1 : past + 1 + len(chunk)], -1][: len(chunk)])
        batch = Batch.of([chunk], [past], [slot], range(len(chunk)))
        logits = backend.to_numpy(backend.forward(batch, cache, kept))
        check_finite(logits)
        kept.end_step(logits, came)
        if progress is not None:
            progress(past + len(chunk), len(tokens))
    return kept.sight(tokens)


@dataclass(slots=True)
class _Layer:
    """What one layer has shown so far, a part per step."""

    keys: list[NDArray] = field(default_factory=list)
    sink: list[NDArray] = field(default_factory=list)
    weight: list[NDArray] = field(default_factory=list)
    where: list[NDArray] = field(default_factory=list)
    chosen: list[NDArray] = field(default_factory=list)
    share: list[NDArray] = field(default_factory=list)
    lens: list[Reading] = field(default_factory=list)

    def sources(self, most: int) -> Sources:
        """Each head's strongest, and of the others the strongest, if possible ``most`` in all."""
        weight, where = np.concatenate(self.weight), np.concatenate(self.where)
        kept = weight >= threshold(weight[..., 1:], max(0, most - weight[..., 0].size))
        kept[..., 0] = weight[..., 0] >= LEAST
        return Sources(np.concatenate(self.sink), weight * kept, where * kept)


class _Recorder:
    """A ``Trace`` that reduces what it is shown at once."""

    def __init__(self, backend: Backend, read: Read) -> None:
        self.config, self.host = backend.config, backend.to_numpy
        count = self.config.num_hidden_layers
        self.sinks = [unpack(read(f"block.{i}.attn.sinks"), np.float32) for i in range(count)]
        self.layers = [_Layer() for _ in range(count)]
        self.residuals: list[NDArray] = []  # of this step, layer by layer
        self.expected: list[Reading] = []
        self.lens = Lens(self.config, read)
        self.q: NDArray = None

    def __call__(self, name: str, x: object) -> None:
        """See ``model.Trace``."""
        first, *rest = name.split(".", 2)
        if first != "block":
            return
        layer = int(rest[0])
        seen = self.layers[layer]
        match rest[1:]:
            case ["attn.q"]:
                self.q = self.host(x)
            case ["attn.k"]:
                seen.keys.append(self.host(x))
                self._attend(layer, seen)
            case ["mlp.chosen"]:
                seen.chosen.append(self.host(x).astype(np.int64))
            case ["mlp.share"]:
                seen.share.append(self.host(x))
            case []:
                self.residuals.append(self.host(x).copy())

    def _attend(self, layer: int, seen: _Layer) -> None:
        """Keep the strongest sources of the newest queries."""
        keys = np.concatenate(seen.keys)
        weights = attention_weights(self.q, keys, self.sinks[layer], self.config.window(layer))
        weight, where = strongest(weights[..., :-1], SOURCES)
        seen.sink.append(weights[..., -1])
        seen.weight.append(weight.astype(np.float32))
        seen.where.append(where.astype(np.int32))

    def end_step(self, logits: NDArray, came: NDArray) -> None:
        """Read the logits, and through the lens every layer's residual."""
        k, truth = min(ALTERNATIVES, logits.shape[1]), logits[np.arange(len(came)), came]
        self.expected.append(read_logits([(0, logits)], came, truth, k))
        count = len(self.layers)
        assert len(self.residuals) == count
        through = self.lens.read(np.concatenate(self.residuals), np.tile(came, count), LENS)
        for i, seen in enumerate(self.layers):
            mine = slice(i * len(came), (i + 1) * len(came))
            seen.lens.append(Reading(*(getattr(through, n)[mine] for n in Reading.__slots__)))
        self.residuals = []

    def sight(self, tokens: Sequence[int]) -> Sight:
        """Everything, put together."""
        most = WEIGHTS // len(self.layers)
        return Sight(
            self.config,
            np.asarray(tokens),
            joined(self.expected),
            [joined(seen.lens) for seen in self.layers],
            [seen.sources(most) for seen in self.layers],
            np.stack([np.concatenate(seen.chosen) for seen in self.layers], axis=1),
            np.stack([np.concatenate(seen.share) for seen in self.layers], axis=1),
        )


def joined(parts: Sequence[Reading]) -> Reading:
    """Readings of rows that follow each other."""
    return Reading(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in Reading.__slots__)
    )
