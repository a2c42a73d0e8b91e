"""The numbers: those of the released models, both dialects, and every way to get them wrong."""

import json
import logging
import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptoss.errors import CheckpointError
from gptoss.model.config import LARGEST, LONGEST, PRESETS, ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss.model.weights import specs

WHOLE = [f.name for f in fields(ModelConfig) if f.type is int]
REAL = [f.name for f in fields(ModelConfig) if f.type is float]
BASE = ModelConfig(
    num_hidden_layers=4,
    hidden_size=128,
    vocab_size=768,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=8,
    experts_per_token=2,
    intermediate_size=128,
    sliding_window=64,
    initial_context_length=256,
    rope_scaling_factor=8.0,
)
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def read(raw: Any) -> ModelConfig:
    return ModelConfig.from_json(raw, origin="here/config.json")


def count(c: ModelConfig, *tails: str) -> int:
    """Parameters in the tensors whose names end so."""
    return sum(math.prod(spec.shape) for spec in specs(c) if spec.name.endswith(tails))


# The released models.


@pytest.mark.parametrize(
    "config, layers, experts", [(gpt_oss_20b(), 24, 32), (gpt_oss_120b(), 36, 128)]
)
def test_presets_have_the_published_numbers(config, layers, experts):
    assert config == ModelConfig(
        num_hidden_layers=layers,
        hidden_size=2880,
        vocab_size=201_088,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=experts,
        experts_per_token=4,
        intermediate_size=2880,
        sliding_window=128,
        swiglu_limit=7.0,
        rms_norm_eps=1e-5,
        rope_theta=150_000.0,
        rope_scaling_factor=32.0,
        rope_ntk_alpha=1.0,
        rope_ntk_beta=32.0,
        initial_context_length=4096,
    )
    assert config.context_length == 131_072
    assert config.qkv_size == 5120


@pytest.mark.parametrize(
    "config, total, active, disk, experts, rest",
    [
        (gpt_oss_20b(), 20.91e9, 3.61e9, 13.76e9, 10.15e9, 3.61e9),
        (gpt_oss_120b(), 116.83e9, 5.13e9, 65.2e9, 60.91e9, 4.33e9),
    ],
    ids=["20b", "120b"],
)
def test_parameters_and_bytes_are_the_published_ones(config, total, active, disk, experts, rest):
    every, matrices = count(config, ""), count(config, "mlp1_weight", "mlp2_weight")
    assert round(every, -7) == total
    of_experts = matrices + count(config, "mlp1_bias", "mlp2_bias")
    unvisited = of_experts * (1 - config.experts_per_token / config.num_experts)
    embedding = config.vocab_size * config.hidden_size  # a row is looked up, not multiplied
    assert round(every - unvisited - embedding, -7) == active
    packed, bf16 = matrices * 17 // 32, (every - matrices) * 2  # a block of 32 takes 17 bytes
    assert packed == pytest.approx(experts, rel=1e-3)
    assert bf16 == pytest.approx(rest, rel=2e-3)
    assert packed + bf16 == pytest.approx(disk, rel=1e-3)


def test_the_yarn_range_is_not_rounded():
    low, high = gpt_oss_20b().yarn_range
    assert low == pytest.approx(8.0928, abs=5e-5)
    assert high == pytest.approx(17.3980, abs=5e-5)


def test_even_layers_slide():
    c = gpt_oss_20b()
    assert [c.window(i) for i in range(4)] == [128, None, 128, None]


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        BASE.hidden_size = 64  # type: ignore[misc]


# Both dialects.

VARIANTS = {name: preset() for name, preset in PRESETS.items()} | {
    "plain rope": replace(BASE, rope_scaling_factor=1.0),
    "odd": replace(BASE, num_hidden_layers=3, rms_norm_eps=1e-6, rope_ntk_beta=20.0),
    "tight": replace(BASE, swiglu_limit=5.0, rope_theta=1e4, sliding_window=1),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dialect", ["original", "huggingface"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_what_is_written_is_read_back(config, dialect, packed, caplog):
    text = json.dumps(config.to_json(dialect, packed=packed))
    assert read(json.loads(text)) == config
    assert not caplog.records


def test_the_original_dialect_is_the_released_file():
    """Without rms_norm_eps, which the original config.json leaves unsaid."""
    raw = asdict(gpt_oss_20b())
    del raw["rms_norm_eps"]
    assert read(raw) == gpt_oss_20b()


def released_huggingface() -> dict[str, Any]:
    """Field by field as published for gpt-oss-20b."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 201088,
    }


def test_the_released_huggingface_file_is_read(caplog):
    assert read(released_huggingface()) == gpt_oss_20b()
    assert not caplog.records


def test_what_we_write_for_huggingface_is_the_released_file():
    ours, theirs = gpt_oss_20b().to_json("huggingface"), released_huggingface()
    same = set(ours) & set(theirs) - {"quantization_config"}
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    assert {"rope_scaling", "rope_theta", "layer_types", "num_local_experts"} <= same
    assert ours["quantization_config"]["quant_method"] == "mxfp4"
    assert "quantization_config" not in gpt_oss_20b().to_json("huggingface", packed=False)


def test_newer_files_put_the_rope_numbers_into_rope_parameters():
    raw = released_huggingface()
    raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    assert read(raw) == gpt_oss_20b()
    del raw["initial_context_length"]
    assert read(raw) == gpt_oss_20b()


def test_what_stands_twice_may_agree_and_what_is_null_is_not_there():
    raw = released_huggingface()
    raw["rope_parameters"] = raw["rope_scaling"] | {"rope_theta": 150000}
    assert read(raw) == gpt_oss_20b()
    names = "architectures quantization_config experts_per_token initial_context_length".split()
    assert read(raw | dict.fromkeys([*names, "rope_scaling"])) == gpt_oss_20b()
    assert read(raw | {"max_position_embeddings": 40960}) == gpt_oss_20b()  # a limit of its user


def test_files_of_other_libraries_may_lack_the_optional_numbers():
    raw = released_huggingface()
    del raw["layer_types"], raw["attention_bias"], raw["rms_norm_eps"]
    raw["rope_scaling"] = {k: v for k, v in ROPE.items() if not k.startswith(("beta", "trunc"))}
    assert read(raw) == gpt_oss_20b()


@pytest.fixture
def library() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_transformers_reads_and_writes_the_same_numbers(library, config, caplog):
    theirs = library.GptOssConfig.from_dict(config.to_json("huggingface", packed=False))
    assert theirs.rope_parameters["rope_type"] == (
        "yarn" if config.rope_scaling_factor > 1.0 else "default"
    )
    with caplog.at_level(logging.WARNING, "gptoss"):
        assert read(theirs.to_dict()) == config
        assert read(json.loads(theirs.to_json_string(use_diff=False))) == config
    assert not [r for r in caplog.records if r.name.startswith("gptoss")]


def test_the_default_config_of_transformers_is_gpt_oss_120b(library):
    assert read(library.GptOssConfig().to_dict()) == gpt_oss_120b()
    assert read(json.loads(library.GptOssConfig().to_json_string(use_diff=False))) == gpt_oss_120b()


def test_what_transformers_saves_is_read(library, tmp_path, caplog):
    config = replace(BASE, hidden_size=32, intermediate_size=32, vocab_size=64, num_experts=2)
    theirs = library.GptOssConfig.from_dict(config.to_json("huggingface", packed=False))
    library.GptOssForCausalLM(theirs).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    with caplog.at_level(logging.WARNING, "gptoss"):
        assert read(raw) == config
    assert not [r for r in caplog.records if r.name.startswith("gptoss")]


# What is refused, and how.

BAD = [True, False, None, "64", math.nan, math.inf, -math.inf, 0, -1, [], {}, 10**400, -(10**400)]


@pytest.mark.parametrize("value", [*BAD, 1.5, 64.0, LARGEST + 1], ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("name", WHOLE)
def test_impossible_whole_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        replace(BASE, **{name: value})
    with pytest.raises(CheckpointError, match=rf"here/config.json: .*{name}"):
        read(asdict(BASE) | {name: value})


@pytest.mark.parametrize("value", [*BAD, 1e300], ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("name", REAL)
def test_impossible_real_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        replace(BASE, **{name: value})
    with pytest.raises(CheckpointError, match=rf"here/config.json: .*{name}"):
        read(asdict(BASE) | {name: value})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_attention_heads": 7}, ["num_attention_heads (7)", "num_key_value_heads (2)"]),
        ({"experts_per_token": 9}, ["experts_per_token (9)", "num_experts (8)"]),
        ({"head_dim": 33}, ["head_dim (33)", "even"]),
        ({"rope_scaling_factor": 0.5}, ["rope_scaling_factor (0.5)"]),
        ({"rope_theta": 1.0}, ["rope_theta (1.0)"]),
        ({"num_hidden_layers": 5000}, ["num_hidden_layers", "4096"]),
        ({"rope_ntk_alpha": 32.0, "rope_ntk_beta": 1.0}, ["rope_ntk_alpha", "rope_ntk_beta"]),
        ({"initial_context_length": 8}, ["initial_context_length (8)"]),
        (
            {"rope_scaling_factor": 1e9},
            ["initial_context_length (256)", "rope_scaling_factor (1000000000.0)", "1048576"],
        ),
        ({"rope_scaling_factor": 4097.0}, ["context_length of 1048832"]),
        ({"head_dim": 2}, ["0..0"]),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused_by_name(change, named):
    with pytest.raises(ValueError) as caught:
        replace(BASE, **change)
    for text in named:
        assert text in str(caught.value)


def test_a_context_of_a_million_tokens_is_the_longest():
    assert replace(BASE, rope_scaling_factor=4096.0).context_length == LONGEST


def test_an_unknown_dialect_is_no_dialect():
    with pytest.raises(ValueError, match="dialect must be one of .*original.*huggingface"):
        BASE.to_json("nonsense")  # type: ignore[arg-type]


def huggingface(**changes: Any) -> dict[str, Any]:
    return BASE.to_json("huggingface") | changes


@pytest.mark.parametrize(
    "raw, said",
    [
        (huggingface(model_type="llama"), "this is a 'llama' model"),
        (huggingface(model_type=["gpt_oss"]), "this is a ['gpt_oss'] model"),
        (huggingface(attention_bias=False), "attention_bias is False"),
        (huggingface(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (huggingface(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (huggingface(swiglu_alpha=1.0), "swiglu_alpha is 1.0"),
        (huggingface(layer_types=["full_attention", "sliding_attention"] * 2), "layer_types[0]"),
        (huggingface(layer_types=["sliding_attention"] * 4), "layer_types[1]"),
        (huggingface(layer_types=["sliding_attention", "full_attention"]), "layer_types"),
        (huggingface(layer_types="sliding_attention"), "layer_types"),
        (huggingface(layer_types=[[], {}, None, 1]), "layer_types[0]"),
        (
            huggingface(experts_per_token=3),
            "experts_per_token is 3, but num_experts_per_tok is 2",
        ),
        (
            huggingface(initial_context_length=512),
            "initial_context_length is 512, but original_max_position_embeddings is 256",
        ),
        (
            huggingface(rope_parameters=huggingface()["rope_scaling"] | {"factor": 4.0}),
            "rope_scaling_factor is 8.0, but rope_scaling_factor of rope_parameters is 4.0",
        ),
        (
            huggingface(rope_parameters={"rope_type": "default"}),
            "rope_scaling_factor is 8.0, but rope_scaling_factor of rope_parameters is 1.0",
        ),
        (
            huggingface(rope_parameters=huggingface()["rope_scaling"] | {"rope_theta": 1e4}),
            "rope_theta is 150000.0, but rope_theta of rope_parameters is 10000.0",
        ),
        (huggingface(rope_parameters=[8]), "rope_parameters must be a JSON object"),
        (
            huggingface(quantization_config={"quant_method": "gptq"}),
            "quant_method of quantization_config is 'gptq'",
        ),
        (huggingface(quantization_config={}), "quant_method of quantization_config is None"),
        (huggingface(quantization_config="fp8"), "quant_method of quantization_config is 'fp8'"),
        (huggingface(architectures=["LlamaForCausalLM"]), "architectures is ['LlamaForCausalLM']"),
        (huggingface(architectures="GptOssForCausalLM"), "architectures is 'GptOssForCausalLM'"),
        (huggingface(rope_scaling=ROPE | {"truncate": True}), "truncate"),
        (huggingface(rope_scaling=ROPE | {"rope_type": "linear"}), "rope_type is 'linear'"),
        (huggingface(rope_scaling=ROPE | {"rope_type": {}}), "rope_type is {}"),
        (
            huggingface(rope_scaling=huggingface()["rope_scaling"] | {"factor": "32"}),
            "scaling_factor",
        ),
        (huggingface(rope_scaling=ROPE | {"attention_factor": 1.0}), "attention_factor"),
        (huggingface(rope_scaling=ROPE | {"mscale": 2.0}), "mscale"),
        (huggingface(rope_scaling={"rope_type": "yarn"}), "rope_scaling_factor"),
        (huggingface(rope_scaling=[32]), "rope_scaling must be a JSON object"),
        (huggingface(rope_scaling=None), "rope_type is None"),
        (huggingface(rope_scaling={}), "rope_type is None"),
        (huggingface(sliding_window=None), "sliding_window"),
        (huggingface(num_local_experts=None), "num_experts"),
        (
            {k: v for k, v in huggingface().items() if k != "swiglu_limit"},
            "swiglu_limit are missing",
        ),
        ({k: v for k, v in huggingface().items() if k != "rope_scaling"}, "rope_type is None"),
        (asdict(BASE) | {"num_layers": 4, "rank": 1}, "'num_layers', 'rank'"),
        ({k: v for k, v in asdict(BASE).items() if k != "head_dim"}, "head_dim are missing"),
        ({}, "are missing"),
        ([], "not list"),
        (None, "not NoneType"),
        ("{}", "not str"),
    ],
)
def test_what_is_not_gpt_oss_is_refused_with_its_reason(raw, said):
    with pytest.raises(CheckpointError) as caught:
        read(raw)
    assert str(caught.value).startswith("here/config.json: ")
    assert said in str(caught.value)


def test_a_yarn_file_never_takes_its_stretched_length_for_the_original_one():
    rope = {k: v for k, v in ROPE.items() if not k.startswith("original")}
    raw = huggingface(rope_scaling=rope)
    del raw["initial_context_length"]
    with pytest.raises(CheckpointError, match="initial_context_length are missing"):
        read(raw)


def test_unknown_fields_of_huggingface_are_told_and_ignored(caplog):
    assert read(huggingface(unsloth_fixed=True, a_novelty=3)) == BASE
    assert "a_novelty, unsloth_fixed" in caplog.text


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.integers(-2, 300)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["gpt_oss", "yarn", "default", "silu", "full_attention"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*ROPE, "rope_theta", "x"]), inner, max_size=4)
    ),
    max_leaves=6,
)
BASES = [asdict(BASE), BASE.to_json("huggingface")]
BASES.append(BASES[1] | {"rope_parameters": BASES[1]["rope_scaling"] | {"rope_theta": 150_000.0}})
KEYS = sorted({key for base in BASES for key in base} | {"type", "swiglu_alpha"})


@given(
    base=st.sampled_from(BASES),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    dropped=st.sets(st.sampled_from(KEYS), max_size=1),
)
@example(base=BASES[0], changes={"rope_theta": 10**400}, dropped=set())
@example(base=BASES[0], changes={"rope_ntk_beta": 1e308}, dropped=set())
@example(base=BASES[0], changes={"rope_ntk_beta": 5e-324}, dropped=set())
@example(base=BASES[0], changes={"rope_scaling_factor": 1e308}, dropped=set())
def test_any_json_gives_a_config_or_a_checkpoint_error(base, changes, dropped):
    raw = {key: value for key, value in (base | changes).items() if key not in dropped}
    try:
        config = read(raw)
    except CheckpointError as error:
        assert str(error).startswith("here/config.json: ")
        return
    assert config.context_length >= config.initial_context_length
    for dialect in "original", "huggingface":
        assert read(config.to_json(dialect)) == config


@given(raw=st.dictionaries(st.text(max_size=6), JSON, max_size=4) | JSON)
def test_any_other_json_gives_a_checkpoint_error(raw):
    with pytest.raises(CheckpointError):
        read(raw)
