"""The numbers that make a gpt-oss model.

Everything that changes the *function the model computes* is here and nothing else is: no device, no
dtype of storage, no batch size. Two models with equal configs and equal weights are the same model.

Two dialects of ``config.json`` are in the wild, the original one (whose field names are ours) and
Hugging Face's ``GptOssForCausalLM``; both are read and written.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from gptoss.errors import CheckpointError

log = logging.getLogger(__name__)

Dialect = Literal["original", "huggingface"]
LARGEST = 1 << 22  # no dimension of a real model comes near; a lying file does
LONGEST = 1 << 20  # tokens; tables as long as the context are made, and the released have 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Architecture of one gpt-oss model. Field names follow the original ``config.json``.

    Raises:
        ValueError: a value that no model can have; the message names the field.

    Source: the gpt-oss model card, section 2 (https://arxiv.org/abs/2508.10925).
    """

    num_hidden_layers: int  # blocks, alternating sliding-window and full attention
    hidden_size: int  # D, width of the residual stream
    vocab_size: int  # V, rows of the embedding, padding included
    num_attention_heads: int  # H, query heads
    num_key_value_heads: int  # K, each shared by H/K query heads
    head_dim: int  # d
    num_experts: int  # E
    experts_per_token: int  # how many of the E a token visits
    intermediate_size: int  # F, width inside one expert
    sliding_window: int = 128  # keys visible in even layers, the query's own included
    swiglu_limit: float = 7.0  # clamp on both halves of the expert activation
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150_000.0
    rope_scaling_factor: float = 32.0  # YaRN context extension; 1.0 turns it off
    rope_ntk_alpha: float = 1.0  # YaRN beta_slow: turns below which a frequency is stretched
    rope_ntk_beta: float = 32.0  # YaRN beta_fast: turns above which it is left alone
    initial_context_length: int = 4096  # tokens the model was trained on before YaRN

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_number(field.name, getattr(self, field.name), whole=field.type is int)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) is more than "
                f"num_experts ({self.num_experts})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        if self.rope_scaling_factor < 1.0:
            raise ValueError(f"rope_scaling_factor ({self.rope_scaling_factor}) must be at least 1")
        if self.context_length > LONGEST:
            raise ValueError(
                f"initial_context_length ({self.initial_context_length}) times rope_scaling_factor "
                f"({self.rope_scaling_factor}) is a context_length of {self.context_length}; "
                f"at most {LONGEST} tokens are supported"
            )
        if self.rope_theta <= 1.0:
            raise ValueError(f"rope_theta ({self.rope_theta}) must be more than 1")
        if self.rope_scaling_factor > 1.0:
            low, high = self.yarn_range
            if not 0 < low < high < self.head_dim // 2 - 1:
                raise ValueError(
                    f"rope_ntk_alpha ({self.rope_ntk_alpha}), rope_ntk_beta ({self.rope_ntk_beta}) "
                    f"and initial_context_length ({self.initial_context_length}) give YaRN the "
                    f"range {low:.2f}..{high:.2f}, which must lie inside "
                    f"0..{self.head_dim // 2 - 1}"
                )

    @property
    def context_length(self) -> int:
        """Most tokens in one row: what the model was trained on, stretched by YaRN."""
        return int(self.initial_context_length * self.rope_scaling_factor)

    @property
    def yarn_range(self) -> tuple[float, float]:
        """First and last pair of the YaRN ramp, NOT rounded (Peng et al. 2023, equation 18)."""
        half = self.head_dim // 2
        low, high = (
            half
            * math.log(self.initial_context_length / (turns * 2 * math.pi))
            / math.log(self.rope_theta)
            for turns in (self.rope_ntk_beta, self.rope_ntk_alpha)
        )
        return low, high

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: queries, then keys, then values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    def window(self, layer: int) -> int | None:
        """Keys visible to ``layer`` (None: all of them). Even layers slide."""
        return self.sliding_window if layer % 2 == 0 else None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], *, origin: str) -> "ModelConfig":
        """Read either dialect; ``origin`` is only for messages.

        Raises:
            CheckpointError: another architecture, an unknown, missing or impossible value.
        """
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{origin}: a config is a JSON object, not {type(raw).__name__}")
        model_type = raw.get("model_type")
        if model_type not in (None, "gpt_oss"):
            raise CheckpointError(
                f"{origin}: this is a {model_type!r} model; gptoss runs gpt-oss models only"
            )
        values = dict(raw) if model_type is None else _from_huggingface(raw, origin)
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise CheckpointError(
                f"{origin}: unknown config fields {', '.join(map(repr, unknown[:8]))}. Either this "
                "is not a gpt-oss checkpoint, or it is newer than this package."
            )
        defaults = {"rms_norm_eps"}  # the one number the original dialect leaves unsaid
        if missing := sorted(names - set(values) - defaults):
            raise CheckpointError(f"{origin}: config fields {', '.join(missing)} are missing")
        try:
            return cls(**values)
        except ValueError as error:
            raise CheckpointError(f"{origin}: {error}") from None

    def to_json(self, dialect: Dialect = "original", *, packed: bool = True) -> dict[str, Any]:
        """The ``config.json`` of either dialect. ``packed``: experts are stored as MXFP4.

        Raises:
            ValueError: an unknown dialect.
        """
        if dialect not in get_args(Dialect):
            raise ValueError(f"dialect must be one of {get_args(Dialect)}, not {dialect!r}")
        return _to_huggingface(self, packed) if dialect == "huggingface" else asdict(self)


def gpt_oss_20b() -> ModelConfig:
    """gpt-oss-20b: 20.9 B parameters, 3.6 B of them active for a token."""
    return ModelConfig(num_hidden_layers=24, num_experts=32, **_RELEASED)


def gpt_oss_120b() -> ModelConfig:
    """gpt-oss-120b: 116.8 B parameters, 5.1 B of them active for a token."""
    return ModelConfig(num_hidden_layers=36, num_experts=128, **_RELEASED)


def nano() -> ModelConfig:
    """The model inside the package: the same architecture, small enough to train on a laptop."""
    return ModelConfig(
        num_hidden_layers=4,
        hidden_size=128,
        vocab_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        intermediate_size=128,
        sliding_window=64,
        initial_context_length=256,
        rope_scaling_factor=8.0,
    )


PRESETS = {"20b": gpt_oss_20b, "120b": gpt_oss_120b, "nano": nano}

_RELEASED: dict[str, Any] = dict(
    hidden_size=2880,
    vocab_size=201_088,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    experts_per_token=4,
    intermediate_size=2880,
)


def _check_number(name: str, value: Any, *, whole: bool) -> None:
    """Refuse what is not a positive, finite number of sensible size."""
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind}, not {value!r}")
    largest = LARGEST if whole else LARGEST**2
    if not 0 < value <= largest:  # false for NaN too
        raise ValueError(f"{name} must be positive and at most {largest}, not {value}")
    if name == "num_hidden_layers" and value > 4096:
        raise ValueError(f"num_hidden_layers must be at most 4096, not {value}")


# Hugging Face's name -> ours, where one number is simply called something else.
_RENAMED = {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
_SAME = (
    "num_hidden_layers hidden_size vocab_size num_attention_heads num_key_value_heads head_dim "
    "intermediate_size sliding_window swiglu_limit rms_norm_eps rope_theta"
).split()
# What the Hugging Face dialect carries besides, where only one value is gpt-oss.
_FIXED = {
    "attention_bias": True,
    "hidden_act": "silu",  # the library's label; the activation is the clamped SwiGLU all the same
    "tie_word_embeddings": False,
    "swiglu_alpha": 1.702,
}
_IGNORED = set(
    "architectures attention_dropout bos_token_id dtype eos_token_id experts_per_token "
    "initial_context_length initializer_range max_position_embeddings model_type "
    "output_router_logits pad_token_id quantization quantization_config router_aux_loss_coef "
    "torch_dtype transformers_version use_cache rope_scaling rope_parameters layer_types "
    "_name_or_path output_attentions output_hidden_states return_dict chunk_size_feed_forward "
    "id2label label2id is_encoder_decoder problem_type auto_map".split()
)


def _from_huggingface(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Our fields out of a ``GptOssForCausalLM`` config."""
    values = {name: raw[name] for name in _SAME if name in raw}
    values |= {ours: raw[theirs] for theirs, ours in _RENAMED.items() if theirs in raw}
    _check_agreement(origin, raw, "experts_per_token", raw, "num_experts_per_tok")
    _check_kind(raw, origin)
    values |= _rope(raw, origin)
    for name, expected in _FIXED.items():
        if raw.get(name, expected) != expected:
            raise CheckpointError(f"{origin}: {name} is {raw[name]!r}; gpt-oss has {expected!r}")
    layers = raw.get("layer_types")
    if layers is not None:
        kinds = ("sliding_attention", "full_attention")
        if not isinstance(layers, list) or len(layers) != raw.get("num_hidden_layers"):
            raise CheckpointError(f"{origin}: layer_types must name every one of the layers")
        for i, kind in enumerate(layers):
            if kind != kinds[i % 2]:
                raise CheckpointError(
                    f"{origin}: layer_types[{i}] is {kind!r}; gpt-oss has {kinds[i % 2]!r} there"
                )
    if extra := sorted(set(raw) - {*_SAME, *_RENAMED, *_FIXED, *_IGNORED}):
        log.warning("%s: ignoring config fields unknown to gpt-oss: %s", origin, ", ".join(extra))
    return values


def _check_agreement(
    origin: str, a: Mapping[str, Any], name: str, b: Mapping[str, Any], other: str, within: str = ""
) -> None:
    """Where one number stands twice, under whatever names, it is the same number."""
    if a.get(name) is not None and b.get(other) is not None and a[name] != b[other]:
        raise CheckpointError(
            f"{origin}: {name} is {a[name]!r}, but {other}{within} is {b[other]!r}"
        )


def _check_kind(raw: Mapping[str, Any], origin: str) -> None:
    """The class and the packing, where the file names them, are those of gpt-oss."""
    kinds, packing = raw.get("architectures"), raw.get("quantization_config")
    if kinds is not None and (not isinstance(kinds, list) or "GptOssForCausalLM" not in kinds):
        raise CheckpointError(
            f"{origin}: architectures is {kinds!r}, without the 'GptOssForCausalLM' of gpt-oss"
        )
    if packing is None or (isinstance(packing, Mapping) and packing == raw.get("quantization")):
        return  # there is none, or it is mlx-lm's, said twice
    method = packing.get("quant_method") if isinstance(packing, Mapping) else packing
    if method != "mxfp4":
        raise CheckpointError(
            f"{origin}: quant_method of quantization_config is {method!r}; gpt-oss has 'mxfp4'"
        )


def _rope(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The YaRN numbers, under either of the names that the library has had for them, or both."""
    found: dict[str, dict[str, Any]] = {}
    given = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for name, rope in (given or {"rope_scaling": {}}).items():
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"{origin}: {name} must be a JSON object, not {rope!r}")
        _check_agreement(origin, raw, "rope_theta", rope, "rope_theta", f" of {name}")
        found[name] = _from_rope(rope, raw, origin)
    old, new = found.get("rope_scaling", {}), found.get("rope_parameters", {})
    for name in sorted(set(old) & set(new)):
        _check_agreement(origin, old, name, new, name, " of rope_parameters")
    return old | new


def _from_rope(rope: Mapping[str, Any], raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The YaRN numbers of ``rope_scaling`` or the newer ``rope_parameters``."""
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("yarn", "default"):  # None too: the library's own default has changed
        raise CheckpointError(f"{origin}: rope_type is {kind!r}; gpt-oss has 'yarn'")
    if rope.get("truncate", False):
        raise CheckpointError(
            f"{origin}: truncate is true, but gpt-oss does not round the YaRN range; set it false"
        )
    values: dict[str, Any] = {}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if "initial_context_length" in raw:
        values["initial_context_length"] = raw["initial_context_length"]
    values |= {"rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}  # YaRN's own defaults
    if kind == "default":
        if "max_position_embeddings" in raw:
            values.setdefault("initial_context_length", raw["max_position_embeddings"])
        return values | {"rope_scaling_factor": 1.0}
    names = {
        "factor": "rope_scaling_factor",
        "beta_slow": "rope_ntk_alpha",
        "beta_fast": "rope_ntk_beta",
        "original_max_position_embeddings": "initial_context_length",
    }
    known = {*names, "rope_type", "type", "rope_theta", "truncate"}
    if extra := sorted(key for key in set(rope) - known if rope[key] is not None):
        raise CheckpointError(f"{origin}: gpt-oss has no {', '.join(extra)} in its rope_scaling")
    _check_agreement(
        origin, raw, "initial_context_length", rope, "original_max_position_embeddings"
    )
    return values | {ours: rope[theirs] for theirs, ours in names.items() if theirs in rope}


def _to_huggingface(c: ModelConfig, packed: bool) -> dict[str, Any]:
    config: dict[str, Any] = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    config |= {name: getattr(c, name) for name in _SAME}
    config |= {theirs: getattr(c, ours) for theirs, ours in _RENAMED.items()} | _FIXED
    kinds = ("sliding_attention", "full_attention")
    config |= {
        "experts_per_token": c.experts_per_token,
        "initial_context_length": c.initial_context_length,
        "layer_types": [kinds[i % 2] for i in range(c.num_hidden_layers)],
        "max_position_embeddings": c.context_length,
        "torch_dtype": "bfloat16",
    }
    config["rope_scaling"] = {"rope_type": "default"}  # left out, the library would turn YaRN on
    if c.rope_scaling_factor > 1.0:
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": c.rope_scaling_factor,
            "beta_fast": c.rope_ntk_beta,
            "beta_slow": c.rope_ntk_alpha,
            "original_max_position_embeddings": c.initial_context_length,
            "truncate": False,
        }
    if packed:
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }
    return config
