import dataclasses
import zlib

import numpy as np
import pytest

from gptoss.backends.protocol import Batch
from gptoss.backends.reference import ReferenceBackend
from gptoss.checkpoint.open import LAYOUTS, open_checkpoint
from gptoss.checkpoint.synthesize import reader, synthesize
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import CODES, Packed
from gptoss.model.weights import specs

SMALL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=128,
    vocab_size=300,
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
DEEP = dataclasses.replace(SMALL, num_hidden_layers=24, experts_per_token=4)


def numbers(stored, dtype=np.float32):
    return stored.decode(dtype) if isinstance(stored, Packed) else stored.astype(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_seed_means_the_same_values_in_every_layout(tmp_path, layout):
    synthesize(SMALL, tmp_path / "x", layout, seed=3)
    checkpoint, drawn = open_checkpoint(tmp_path / "x"), reader(SMALL, seed=3)
    assert checkpoint.layout.name == layout
    assert checkpoint.config == SMALL
    for spec in specs(SMALL):
        found, expected = numbers(checkpoint.read(spec.name)), numbers(drawn(spec.name))
        assert found.shape == spec.shape
        assert np.array_equal(found, expected), spec.name


def test_seeds_layers_and_tensors_differ():
    drawn = [numbers(reader(SMALL, seed)(f"block.{i}.mlp.mlp1_weight")) for seed, i in SEEDS]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert np.mean(a != b) > 0.5
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


SEEDS = [(0, 0), (0, 1), (1, 0), (12345678901234567890, 0)]


@pytest.mark.parametrize(
    "name, checksum",
    [
        ("embedding.weight", 1199150663),
        ("block.1.attn.norm.scale", 3905544218),
        ("block.1.mlp.mlp2_weight", 571972075),
    ],
)
def test_a_seed_means_the_same_values_for_ever(name, checksum):
    assert zlib.crc32(numbers(reader(SMALL, 7)(name)).astype("<f4").tobytes()) == checksum


def test_every_tensor_is_spread_as_promised():
    draw = reader(DEEP)
    columns = DEEP.hidden_size
    for name, mean, spread in [
        ("embedding.weight", 0, 1.0),
        ("unembedding.weight", 0, 2.0 / columns**0.5),
        ("block.7.attn.qkv.weight", 0, 1.0 / columns**0.5),
        ("block.7.attn.out.weight", 0, 0.5 / 256**0.5),
        ("block.7.attn.qkv.bias", 0, 0.1),
        ("block.7.mlp.norm.scale", 1, 0.1),
        ("block.7.mlp.mlp1_weight", 0, 1.0 / columns**0.5),
        ("block.7.mlp.mlp2_weight", 0, 0.5 / DEEP.intermediate_size**0.5),
        ("block.7.mlp.mlp1_bias", 0, 0.1),
    ]:
        values = numbers(draw(name), np.float64)
        close = 4 / values.size**0.5 + 0.01
        assert values.std() == pytest.approx(spread, rel=close), name
        assert values.mean() == pytest.approx(mean, abs=close * spread), name
    sinks = np.concatenate([numbers(draw(f"block.{i}.attn.sinks")) for i in range(24)])
    assert sinks.std() == pytest.approx(1.0, rel=0.2)


def test_nibbles_are_as_frequent_as_in_a_rounded_normal_distribution():
    packed = reader(DEEP)("block.0.mlp.mlp1_weight")
    both = np.stack([packed.blocks & 15, packed.blocks >> 4])
    found = np.bincount(both.ravel(), minlength=16) / both.size
    rounded = np.abs(2.5 * np.random.default_rng(0).standard_normal(10**6))[:, None] - CODES[:8]
    expected = np.bincount(np.abs(rounded).argmin(1)) / 10**6 / 2  # half of them negative
    assert np.abs(found[:8] - expected).max() < 0.02
    assert np.abs(found[8:] - expected).max() < 0.02
    assert abs(np.corrcoef(*(CODES[n].ravel() for n in both))[0, 1]) < 0.01
    assert len(np.unique(packed.scales)) == 2


def test_activations_neither_vanish_nor_explode():
    backend = ReferenceBackend(DEEP, lambda name: numbers(reader(DEEP)(name)))
    cache = backend.new_cache(max_tokens=60)
    tokens = np.random.default_rng(0).integers(0, DEEP.vocab_size, 60)
    batch = Batch.of([tokens], [0], [cache.open()], wanted=range(60))
    seen = {}
    logits = backend.forward(batch, cache, lambda name, x: seen.setdefault(name, np.array(x)))
    residual = [np.sqrt(np.mean(seen[f"block.{i}"] ** 2)) for i in range(24)]
    assert min(residual) > 0.9 and max(residual) < 10, residual
    for i in range(24):
        for room in ("attn", "mlp"):
            assert 0.05 < np.std(seen[f"block.{i}.{room}.out"]) < 2, (i, room)
        used = np.bincount(seen[f"block.{i}.mlp.chosen"].ravel(), minlength=8)
        assert np.count_nonzero(used) >= 7 and used.max() < 60, (i, used)
        share = seen[f"block.{i}.mlp.share"]
        assert 0.3 < share[:, 0].mean() < 0.7, (i, share[:, 0].mean())
    assert 1 < logits.std() < 3
    assert np.std(logits, axis=0).mean() > 0.5  # the answer depends on what was said


def test_columns_that_mxfp4_cannot_hold_are_refused(tmp_path):
    config = dataclasses.replace(SMALL, intermediate_size=48)
    with pytest.raises(ValueError, match=r"block.0.mlp.mlp2_weight has 48 columns"):
        synthesize(config, tmp_path / "x", "huggingface-bf16")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_is_copied_and_progress_reported(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    calls = []
    path = synthesize(
        SMALL,
        tmp_path / "x",
        tokenizer_path=tmp_path / "tokenizer.json",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (path / "tokenizer.json").read_text() == "{}"
    done, total = zip(*calls, strict=True)
    assert list(done) == sorted(done) and done[-1] == total[0] and len(set(total)) == 1
