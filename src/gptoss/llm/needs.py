"""How much memory a model takes, by its shapes alone."""

import math
from dataclasses import dataclass, replace

from gptoss.backends import is_narrow
from gptoss.engine import STEP_TOKENS
from gptoss.model.config import ModelConfig
from gptoss.model.weights import specs

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
PACKED = 17 / 32  # bytes of a weight in MXFP4
ROUNDED = 17 / 16  # of one in 8 bits, with its share of a scale
TWELVE = 1.55  # of one in twelve bits, with its share of the row's exponents and of what fits not
MLX_SCORES = 1 << 26  # bytes of attention that MLX holds together on a CPU
AFFINE = {"fast": 9 / 8, "small": 5 / 8}  # of mlx, where scale and offset are float32
NATIVE_CHUNK = 512  # tokens that a sliding layer of the native backend holds beside its window


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes of memory, estimated."""

    weights: int
    cache: int  # keys and values of max_tokens
    working: int  # the largest step's intermediate values
    mapped: int = 0  # of the weights, packed experts that may stay on disk until they are used
    layer: int = 0  # of those, one layer's: a prompt uses them all at once
    visited: int = 0  # of those, what a token uses in all layers

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.cache + self.working

    @property
    def least(self) -> int:
        """The same with the experts of all layers but one on disk."""
        return self.total - self.mapped + self.layer


def estimate(
    config: ModelConfig,
    backend: str,
    numbers: str,
    max_tokens: int,
    *,
    packed: bool = True,
    step: int = STEP_TOKENS,
    kv: str | None = None,
    conversations: int = 1,
    precision: str | None = None,
) -> Needs:
    """Memory to run a model in these ``numbers``: a dtype, or the native backend's precision.

    ``precision`` is mlx's, which has both.
    ``step`` and ``kv``: of the native backend, tokens of a prompt that are computed together at
    most, and how keys and values are kept (see ``kept``).
    Pages of a mapped file count like any other, though ``mapped`` ones need not all stay.
    """
    match backend:
        case "native":
            kv = kept(config, numbers, kv)
            needs = _native(config, numbers, max_tokens, packed, step, kv)
        case "reference":
            needs = _reference(config, BYTES[numbers], max_tokens, packed)
        case "mlx":
            needs = _mlx(config, BYTES[numbers], precision or "exact", max_tokens, packed, kv)
        case _:
            needs = _torch(config, BYTES[numbers], max_tokens, packed)
    return replace(needs, cache=needs.cache * conversations)


def counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters outside and inside the experts' matrices."""
    sums = {"dense": 0, "expert": 0}
    for spec in specs(config):
        sums[spec.kind] += math.prod(spec.shape)
    return sums["dense"], sums["expert"]


def parameters(config: ModelConfig) -> int:
    """All of them."""
    return sum(counts(config))


def eight_bits(config: ModelConfig, precision: str) -> bool:
    """Whether the native backend rounds anything to 8 bits."""
    return precision == "fast" and not is_narrow(config)


def matrix_width(config: ModelConfig, precision: str) -> float:
    """Bytes of a number of the native backend's large dense matrices."""
    if is_narrow(config):
        return BYTES["bfloat16"]
    return ROUNDED if eight_bits(config, precision) else TWELVE


def kept(config: ModelConfig, precision: str, kv: str | None) -> str:
    """How the native backend keeps keys and values, unless ``kv`` says."""
    return kv or ("bfloat16" if eight_bits(config, precision) else "float32")


def key_width(config: ModelConfig, kv: str) -> float:
    """Bytes of one number of a key or a value; in int8 with its share of a scale."""
    return 1 + 4 / config.head_dim if kv == "int8" else BYTES[kv]


def mlx_key_width(config: ModelConfig, width: int, kv: str | None) -> float:
    """Bytes of one number of a key or a value in mlx, whose dtype takes ``width``; in int8 with its
    shares of a scale and an offset."""
    return 1 + 2 * width / min(64, config.head_dim) if kv == "int8" else width


def _native(
    c: ModelConfig, precision: str, max_tokens: int, packed: bool, step: int, kv: str
) -> Needs:
    """Everything as stored; fast rounds the matrices that every token passes through."""
    dense, experts = counts(c)
    D, F, V, heads = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_attention_heads
    matrices = _matrices(c)
    stored = round(experts * _stored(packed))
    mapped = stored if packed else 0
    beside, step = max(NATIVE_CHUNK, step), min(step, max_tokens)
    a_token = 8 * D + 2 * c.qkv_size + c.experts_per_token * (3 * F + 2 * D)  # float32 values
    return Needs(
        weights=round(2 * (dense - matrices) + matrix_width(c, precision) * matrices) + stored,
        cache=round(_cached(c, max_tokens, beside) * key_width(c, kv)),
        working=4 * step * a_token + 4 * heads * max_tokens + 32 * V,
        mapped=mapped,
        layer=mapped // c.num_hidden_layers,
        visited=mapped * c.experts_per_token // c.num_experts,
    )


def _matrices(c: ModelConfig) -> int:
    """Parameters of the dense matrices that every token passes through."""
    heads = c.num_attention_heads * c.head_dim
    layer = c.hidden_size * (c.qkv_size + heads)
    return c.vocab_size * c.hidden_size + c.num_hidden_layers * layer


def _mlx(
    c: ModelConfig, width: int, precision: str, max_tokens: int, packed: bool, kv: str | None
) -> Needs:
    """Packed experts as stored, others in float32 (as on a CPU), the rest cast or rounded."""
    dense, experts = counts(c)
    rounded = _matrices(c) if precision in AFFINE else 0
    step, visits = min(STEP_TOKENS, max_tokens), c.experts_per_token
    a_token = 8 * c.hidden_size + 2 * visits * (3 * c.intermediate_size + c.hidden_size)
    weights = (dense - rounded) * width + rounded * AFFINE.get(precision, width)
    return Needs(
        weights=round(weights + experts * (PACKED if packed else BYTES["float32"])),
        cache=round(_cached(c, max_tokens, step) * mlx_key_width(c, width, kv)),
        working=4 * step * a_token + MLX_SCORES + 32 * c.vocab_size,
    )


def _torch(c: ModelConfig, width: int, max_tokens: int, packed: bool) -> Needs:
    """Experts as stored, the rest in the compute dtype."""
    dense, experts = counts(c)
    step = min(STEP_TOKENS, max_tokens)
    return Needs(
        weights=round(dense * width + experts * _stored(packed)),
        cache=_cached(c, max_tokens, step) * width,
        working=_step(c, width, step) + step * max_tokens * 4,
    )


def _reference(c: ModelConfig, width: int, max_tokens: int, packed: bool) -> Needs:
    """As torch, but a small model's experts are widened too, and nothing is forgotten."""
    from gptoss.backends.reference.backend import SMALL  # the room is opened only when asked

    dense, experts = counts(c)
    step, heads = min(STEP_TOKENS, max_tokens), c.num_attention_heads
    widened = experts * width <= SMALL
    scores = 3 * heads * step * max_tokens * width
    repeated = 2 * max_tokens * heads * c.head_dim * width
    return Needs(
        weights=round(dense * width + experts * (width if widened else _stored(packed))),
        cache=_cached(c, max_tokens, None) * width,
        working=_step(c, width, step) + scores + repeated,
    )


def _stored(packed: bool) -> float:
    """Bytes of an expert's weight in the file."""
    return PACKED if packed else BYTES["bfloat16"]


def _cached(c: ModelConfig, max_tokens: int, beside: int | None) -> int:
    """Values of all layers' caches; sliding ones hold the window and some tokens ``beside`` it."""
    held = [
        max_tokens
        if beside is None or (window := c.window(i)) is None
        else min(max_tokens, window + beside)
        for i in range(c.num_hidden_layers)
    ]
    return sum(held) * 2 * c.num_key_value_heads * c.head_dim


def _step(c: ModelConfig, width: int, step: int) -> int:
    """One expert and what its decoding passes through, the residual stream, the logits."""
    decoded = 3 * c.intermediate_size * c.hidden_size * width * 3
    return decoded + 8 * step * c.hidden_size * width + 32 * c.vocab_size
