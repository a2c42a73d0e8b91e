"""What a step must read and compute at least, counted from the shapes.

Bytes. A step reads once: every dense matrix (attention, router, and the unembedding if logits are
wanted), each expert that any of its tokens visits, the vectors beside them, the embedding rows of
its tokens, and for each row the keys and values that its tokens see. Everything at the width in
which the backend holds it. Not counted: activations, which stay in caches, and what is written.

Operations. A multiplication or an addition is one; so a weight costs a token two, and so does each
number of a key or value that a query sees. Norms, rotations, softmax and activation are left out.

Real traffic is larger where a backend reads something twice. The count is what it could not avoid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gptoss.backends.protocol import Batch
from gptoss.llm.needs import (
    AFFINE,
    BYTES,
    PACKED,
    counts,
    kept,
    key_width,
    matrix_width,
    mlx_key_width,
)
from gptoss.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Bytes of one number, as a backend holds it."""

    matrix: float  # queries, keys, values, attention's output, the unembedding
    gate: float  # the router
    expert: float  # the experts' matrices
    vector: float  # norms, biases, sinks
    embedding: float
    cache: float  # keys and values


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one step, or of several together."""

    bytes: float = 0.0
    operations: float = 0.0
    experts: float = 0.0  # of the operations, those of the experts

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.bytes + other.bytes,
            self.operations + other.operations,
            self.experts + other.experts,
        )


def widths(
    config: ModelConfig,
    backend: str,
    numbers: str,
    *,
    packed: bool,
    kv: str | None = None,
    precision: str | None = None,
) -> Widths:
    """How a backend holds its weights in these ``numbers``: a dtype, or native's precision.

    ``kv`` is the native backend's, as ``needs.kept`` takes it; ``precision`` mlx's, beside a dtype.
    """
    stored = PACKED if packed else BYTES["bfloat16"]
    if backend == "native":
        return Widths(
            matrix=matrix_width(config, numbers),
            gate=2,
            expert=stored,
            vector=4,
            embedding=2,
            cache=key_width(config, kept(config, numbers, kv)),
        )
    width = BYTES[numbers]
    if backend == "reference":
        from gptoss.backends.reference.backend import SMALL  # the room is opened only when asked

        stored = width if counts(config)[1] * width <= SMALL else stored
    matrix, cache = float(width), float(width)
    if backend == "mlx":
        cache = mlx_key_width(config, width, kv)
        matrix, stored = AFFINE.get(precision or "", width), stored if packed else 4
    return Widths(
        matrix=matrix, gate=width, expert=stored, vector=width, embedding=width, cache=cache
    )


def cost(
    config: ModelConfig, widths: Widths, batch: Batch, visited: Sequence[float] | None = None
) -> Cost:
    """Of one forward pass.

    Args:
        visited: how many different experts the batch visits in each layer; None: as many as chance
            would have it, see ``by_chance``.
    """
    c, w = config, widths
    T, W, L = len(batch.tokens), len(batch.wanted), c.num_hidden_layers
    D, F, k, heads = c.hidden_size, c.intermediate_size, c.experts_per_token, c.num_attention_heads
    visited = [by_chance(c, T)] * L if visited is None else visited
    matrices = D * c.qkv_size + D * heads * c.head_dim  # of a layer
    gate, unembedding, expert = D * c.num_experts, D * c.vocab_size, 3 * D * F
    vectors = c.qkv_size + heads + 3 * D + c.num_experts  # of a layer outside its experts
    new = batch.starts[1:] - batch.starts[:-1]
    lengths = list(zip(batch.past.tolist(), new.tolist(), strict=True))
    spans = sum(span(p, n, c.window(i)) for i in range(L) for p, n in lengths)
    pairs = sum(seen(p, n, c.window(i)) for i in range(L) for p, n in lengths)
    return Cost(
        bytes=w.matrix * (L * matrices + (unembedding if W else 0))
        + w.gate * L * gate
        + sum(visited) * (w.expert * expert + w.vector * (2 * F + D))
        + w.vector * (L * vectors + D)
        + w.embedding * T * D
        + w.cache * spans * 2 * c.num_key_value_heads * c.head_dim,
        operations=2 * T * L * (matrices + gate + k * expert)
        + 2 * W * unembedding
        + 4 * pairs * heads * c.head_dim,
        experts=2 * T * L * k * expert,
    )


def by_chance(config: ModelConfig, tokens: int) -> float:
    """Different experts that so many tokens visit if each chooses evenly and by itself."""
    missed = (1 - config.experts_per_token / config.num_experts) ** tokens
    return config.num_experts * (1 - missed)


def span(past: int, new: int, window: int | None) -> int:
    """Keys of one row that any of its new tokens sees."""
    return past + new if window is None else min(past, window - 1) + new


def seen(past: int, new: int, window: int | None) -> int:
    """Pairs of a new token and a key that it sees, its own included."""
    if window is None:
        return new * past + new * (new + 1) // 2
    growing = min(new, max(0, window - past))  # tokens whose past still fits the window
    return growing * past + growing * (growing + 1) // 2 + (new - growing) * window
