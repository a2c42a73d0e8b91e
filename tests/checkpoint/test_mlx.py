"""What only mlx-lm's directories have: rounded matrices, and a config that says how."""

import json

import ml_dtypes
import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.backends.protocol import Batch
from gptoss.checkpoint.open import LAYOUTS, open_checkpoint
from gptoss.checkpoint.save import convert
from gptoss.errors import CheckpointError
from gptoss.model.weights import specs
from tests.checkpoint.by_hand import TINY, canonical, save, stored, write

WEIGHTS = canonical()
DENSE = ("embed_tokens", "_proj", "router", "lm_head")  # what mlx-lm rounds, experts aside
PARTS = ("weight", "scales", "biases")


def rounded(x, bits, group, dtype=ml_dtypes.bfloat16):
    """Integers in words, scales and biases of [rows, columns], and the numbers they stand for."""
    groups = x.astype(np.float32).reshape(len(x), -1, group)
    biases = groups.min(-1, keepdims=True).astype(dtype).astype(np.float32)
    scales = (np.ptp(groups, axis=-1, keepdims=True) / (2**bits - 1)).astype(dtype)
    scales = scales.astype(np.float32)
    integers = np.rint((groups - biases) / scales).clip(0, 2**bits - 1).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = (integers.reshape(len(x), -1, 32 // bits) << shifts).sum(-1, dtype=np.uint32)
    numbers = (scales * integers.astype(np.float32) + biases).reshape(x.shape)
    return [words, scales[..., 0].astype(dtype), biases[..., 0].astype(dtype)], numbers


def community(folder, bits=8, group=32, **change):
    """A directory as mlx-lm leaves it after rounding; the matrices that were rounded, as numbers.

    ``change`` takes the three parts of the unembedding and gives others, or None to leave one out.
    """
    path = write(folder, LAYOUTS["mlx"], WEIGHTS)
    tensors, numbers = {}, {}
    for name, x in stored(LAYOUTS["mlx"], WEIGHTS).items():
        matrix = name.endswith(".weight") and x.dtype != np.uint32 and x.ndim == 2
        if matrix and any(part in name for part in DENSE):
            parts, numbers[name] = rounded(x, bits, group)
            parts = dict(zip(PARTS, parts, strict=True))
            if name.startswith("lm_head"):
                parts |= {part: make(parts[part]) for part, make in change.items()}
            stem = name.removesuffix("weight")
            tensors |= {stem + part: x for part, x in parts.items() if x is not None}
        else:
            tensors[name] = x
    save(path / "model.safetensors", tensors)
    return path, numbers


@pytest.mark.parametrize("bits, group", [(8, 32), (8, 64), (4, 32), (4, 64), (2, 32)])
def test_rounded_matrices_open_as_the_numbers_they_stand_for(tmp_path, bits, group):
    path, numbers = community(tmp_path / "m", bits, group)
    opened = open_checkpoint(path)
    opened.check()
    assert (opened.layout.name, opened.config) == ("mlx", TINY)
    found = opened.read("unembedding.weight")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, numbers["lm_head.weight"])
    qkv = [numbers[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    np.testing.assert_array_equal(opened.read("block.1.attn.qkv.weight"), np.concatenate(qkv))
    here = "model.layers.0.mlp.router.weight"
    np.testing.assert_array_equal(opened.read("block.0.mlp.gate.weight"), numbers[here])
    experts = opened.read("block.0.mlp.mlp1_weight")
    np.testing.assert_array_equal(experts.blocks, WEIGHTS["block.0.mlp.mlp1_weight"].blocks)
    opened.release()
    np.testing.assert_array_equal(opened.read("unembedding.weight"), numbers["lm_head.weight"])


@pytest.mark.parametrize("bits, group", [(8, 32), (4, 64)])
def test_mlx_itself_reads_the_same_numbers(tmp_path, bits, group):
    mx = pytest.importorskip("mlx.core")
    path, _ = community(tmp_path / "m", bits, group)
    theirs = mx.load(str(path / "model.safetensors"))
    parts = [theirs[f"model.embed_tokens.{part}"] for part in PARTS]
    words, scales, biases = parts[0], *(x.astype(mx.float32) for x in parts[1:])
    dense = mx.dequantize(words, scales, biases, group, bits)
    np.testing.assert_array_equal(np.array(dense), open_checkpoint(path).read("embedding.weight"))
    stem = "model.layers.1.mlp.experts.up_proj"
    up = mx.dequantize(
        theirs[f"{stem}.weight"], theirs[f"{stem}.scales"], mode="mxfp4", dtype=mx.float32
    )
    np.testing.assert_array_equal(
        np.array(up), WEIGHTS["block.1.mlp.mlp1_weight"].decode()[:, 1::2]
    )


def test_a_rounded_directory_runs_and_becomes_any_other_layout(tmp_path):
    path, _ = community(tmp_path / "m")
    opened = open_checkpoint(path)
    copied = open_checkpoint(convert(path, tmp_path / "hf", "huggingface"))
    for spec in specs(TINY):
        expected = opened.dense(spec.name).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(copied.dense(spec.name), expected.astype(np.float32))
    logits = []
    for checkpoint in (opened, copied):
        backend = load_backend("reference", TINY, checkpoint.read)
        cache = backend.new_cache(max_tokens=9)
        logits.append(backend.forward(Batch.of([[1, 2, 3]], [0], [cache.open()]), cache))
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.1 * np.abs(logits[0]).max()


@pytest.mark.parametrize(
    "change",
    [
        {"biases": lambda x: None},  # MLX's other formats have none
        {"weight": lambda x: x[:, :-1]},
        {"weight": lambda x: x[:-1]},
        {"scales": lambda x: x.astype(np.uint8)},
        {"scales": lambda x: x[:, :0], "biases": lambda x: x[:, :0]},
        {"biases": lambda x: x[:, :1]},
        {"weight": lambda x: np.tile(x, (1, 3))[:, :6]},  # three bits
    ],
)
def test_what_was_rounded_otherwise_is_refused(tmp_path, change):
    path, _ = community(tmp_path / "m", **change)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' \[.* known are groups of 2, 4, 8"):
        open_checkpoint(path)


def test_experts_that_were_rounded_again_are_refused(tmp_path):
    path, _ = community(tmp_path / "m")
    tensors = stored(LAYOUTS["mlx"], WEIGHTS)
    stem = "model.layers.0.mlp.experts.gate_proj"
    for part in ("scales", "biases"):
        tensors[f"{stem}.{part}"] = np.zeros((3, 96, 2), ml_dtypes.bfloat16)
    save(path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"gate_proj' is rounded a second time.*--to mlx"):
        open_checkpoint(path)


def test_a_damaged_scale_is_found(tmp_path):
    def broken(scales):
        scales = scales.copy()
        scales[1, 1] = np.nan
        return scales

    path, _ = community(tmp_path / "m", scales=broken)
    with pytest.raises(CheckpointError, match="'lm_head.weight' at .* is nan"):
        open_checkpoint(path).check()


def test_the_config_says_what_mlx_lm_looks_for(tmp_path):
    path = convert(write(tmp_path / "m", LAYOUTS["original"], WEIGHTS), tmp_path / "x", "mlx")
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "gpt_oss"
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert config["quantization_config"] == config["quantization"]


def test_two_accounts_of_the_rounding_that_differ_are_refused(tmp_path):
    path = write(tmp_path / "m", LAYOUTS["mlx"], WEIGHTS)
    config = json.loads((path / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quant_method of quantization_config is None"):
        open_checkpoint(path)
