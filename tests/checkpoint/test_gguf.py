import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, quants
from gguf.constants import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES, GGMLQuantizationType

import gptoss
from gptoss.checkpoint import staged
from gptoss.checkpoint.gguf import q8_0, write_gguf
from gptoss.checkpoint.open import open_checkpoint
from gptoss.checkpoint.save import save
from gptoss.checkpoint.synthesize import synthesize
from gptoss.errors import CheckpointError
from gptoss.llm.models import resolve
from gptoss.model.weights import random_weights
from gptoss.text.tokenizer import Tokenizer
from tests.checkpoint.by_hand import TINY, canonical

ODD = dataclasses.replace(  # columns that are no power of two, a head that divides nothing
    TINY, hidden_size=96, intermediate_size=160, num_attention_heads=3, num_key_value_heads=1
)
KIND = GGMLQuantizationType


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    room = tmp_path_factory.mktemp("sources")
    for layout in ("original", "huggingface", "huggingface-bf16"):
        weights = canonical(ODD)
        save(ODD, weights.__getitem__, room / f"odd-{layout}", layout)
    return {
        "nano": resolve("nano"),
        **{p.name: p for p in room.iterdir()},
    }


def opened(path):
    """Tensors as numbers, their kinds, and the keys, as an independent library reads them."""
    reader = GGUFReader(path)
    found = {}
    for t in reader.tensors:
        numbers = quants.dequantize(t.data, t.tensor_type) if t.data.dtype == np.uint8 else t.data
        found[t.name] = np.asarray(numbers, np.float32).reshape(t.shape[::-1].tolist())
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    return found, kinds, {name: f.contents() for name, f in reader.fields.items()}


def expected(checkpoint):
    """The same by hand from the canonical tensors."""
    c = checkpoint.config
    get = checkpoint.dense
    found = {
        "token_embd.weight": get("embedding.weight"),
        "output_norm.weight": get("norm.scale"),
        "output.weight": get("unembedding.weight"),
    }
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for i in range(c.num_hidden_layers):
        old, new = f"block.{i}.", f"blk.{i}."
        for part in ("weight", "bias"):
            fused = get(f"{old}attn.qkv.{part}")
            found[f"{new}attn_q.{part}"] = fused[:q]
            found[f"{new}attn_k.{part}"] = fused[q : q + k]
            found[f"{new}attn_v.{part}"] = fused[q + k :]
            found[f"{new}attn_output.{part}"] = get(f"{old}attn.out.{part}")
            found[f"{new}ffn_gate_inp.{part}"] = get(f"{old}mlp.gate.{part}")
            both = get(f"{old}mlp.mlp1_{part}")
            found[f"{new}ffn_gate_exps.{part}"] = both[:, ::2]
            found[f"{new}ffn_up_exps.{part}"] = both[:, 1::2]
            found[f"{new}ffn_down_exps.{part}"] = get(f"{old}mlp.mlp2_{part}")
        found[f"{new}attn_norm.weight"] = get(f"{old}attn.norm.scale")
        found[f"{new}post_attention_norm.weight"] = get(f"{old}mlp.norm.scale")
        found[f"{new}attn_sinks.weight"] = get(f"{old}attn.sinks")
    return found


# Values


@pytest.mark.parametrize(
    "name", ["nano", "odd-original", "odd-huggingface", "odd-huggingface-bf16"]
)
def test_every_value_of_a_checkpoint_is_in_its_gguf(sources, tmp_path, name):
    source = open_checkpoint(sources[name])
    found, kinds, _ = opened(write_gguf(sources[name], tmp_path / "x.gguf"))
    wanted = expected(source)
    assert set(found) == set(wanted)
    for tensor, numbers in wanted.items():
        assert np.array_equal(found[tensor], numbers), tensor
    for tensor, kind in kinds.items():
        expert = tensor.endswith("_exps.weight")
        matrix = wanted[tensor].ndim == 2 and tensor.endswith("weight") and "gate_inp" not in tensor
        assert kind == (KIND.MXFP4 if expert else KIND.BF16 if matrix else KIND.F32), tensor


def test_q8_0_rounds_the_dense_matrices_as_the_library_does_and_nothing_else(sources, tmp_path):
    source = open_checkpoint(sources["odd-original"])
    found, kinds, _ = opened(write_gguf(source.path, tmp_path / "x.gguf", dense="q8_0"))
    rounded = [tensor for tensor, kind in kinds.items() if kind == KIND.Q8_0]
    assert len(rounded) == 2 + 4 * ODD.num_hidden_layers
    for tensor, numbers in expected(source).items():
        if tensor in rounded:
            numbers = quants.dequantize(quants.quantize(numbers, KIND.Q8_0), KIND.Q8_0)
        assert np.array_equal(found[tensor], numbers), tensor


def test_q8_0_is_the_librarys_to_the_byte_also_for_zeros_halves_and_tiny_values():
    x = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    x[0], x[1, :32], x[2] = 0, np.arange(32) + 0.5, x[2] * 1e-9
    x[1, 0] = 127
    assert np.array_equal(q8_0(x), quants.quantize(x, KIND.Q8_0))


def test_a_value_too_large_for_q8_0_is_refused(tmp_path):
    weights = random_weights(ODD)
    weights["embedding.weight"][3, 5] = 1e9
    save(ODD, weights.__getitem__, tmp_path / "large", "original")
    with pytest.raises(CheckpointError, match=r"embedding\.weight: a value is too large for Q8_0"):
        write_gguf(tmp_path / "large", tmp_path / "x.gguf", dense="q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["large"]


def test_slabs_do_not_change_a_byte(sources, tmp_path, monkeypatch):
    whole = write_gguf(sources["nano"], tmp_path / "a.gguf", dense="q8_0").read_bytes()
    monkeypatch.setattr("gptoss.checkpoint.pieces.PIECE", 1000)
    monkeypatch.setattr("gptoss.checkpoint.pieces.THREADS", 3)
    monkeypatch.setattr("gptoss.checkpoint.pieces.STRIP", 7)
    assert write_gguf(sources["nano"], tmp_path / "b.gguf", dense="q8_0").read_bytes() == whole


# Keys


def test_the_names_are_those_of_the_architecture(sources, tmp_path):
    found, *_ = opened(write_gguf(sources["nano"], tmp_path / "x.gguf"))
    known = {TENSOR_NAMES[t].format(bid="N") for t in MODEL_TENSORS[MODEL_ARCH.GPT_OSS]}
    assert {re.sub(r"blk\.\d+", "blk.N", n).rsplit(".", 1)[0] for n in found} == known


def test_the_keys_say_what_the_config_says(sources, tmp_path):
    _, _, keys = opened(write_gguf(sources["nano"], tmp_path / "x.gguf"))
    c = open_checkpoint(sources["nano"]).config
    own = {k.removeprefix("gpt-oss."): v for k, v in keys.items() if k.startswith("gpt-oss.")}
    assert keys["general.architecture"] == "gpt-oss"
    assert own.pop("attention.layer_norm_rms_epsilon") == pytest.approx(c.rms_norm_eps)
    assert own == {
        "vocab_size": 1024,
        "context_length": 2048,
        "embedding_length": 128,
        "block_count": 4,
        "feed_forward_length": 128,
        "expert_feed_forward_length": 128,
        "expert_count": 8,
        "expert_used_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.sliding_window": 64,
        "rope.dimension_count": 32,
        "rope.freq_base": 150000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 256,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }


def test_without_yarn_no_scaling_is_promised(tmp_path):
    plain = dataclasses.replace(TINY, rope_scaling_factor=1.0)
    synthesize(plain, tmp_path / "plain")
    _, _, keys = opened(write_gguf(tmp_path / "plain", tmp_path / "x.gguf"))
    assert keys["gpt-oss.rope.scaling.type"] == "none"
    assert "gpt-oss.rope.scaling.factor" not in keys
    assert keys["tokenizer.ggml.model"] == "none"  # none beside it, and none of 48 ids


def test_the_vocabulary_is_the_tokenizers_and_padding_is_unused(sources, tmp_path):
    _, _, keys = opened(write_gguf(sources["nano"], tmp_path / "x.gguf"))
    tokenizer = Tokenizer.from_file(sources["nano"] / "tokenizer.json")
    names, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(names) == len(kinds) == len(set(names)) == 1024
    ours = {i: name for name, i in tokenizer.specials.items()}
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if i >= tokenizer.vocab_size:
            assert (name, kind) == (f"[PAD{i}]", 5)
        elif i in ours:
            assert (name, kind) == (ours[i], 3)
        else:
            assert kind == 1
            raw = tokenizer.decode_bytes([i])
            if raw.isascii() and raw.isalnum():
                assert name == raw.decode()
    known = {n for n, k in zip(names, kinds, strict=True) if k == 1}
    merges = [merge.split(" ") for merge in keys["tokenizer.ggml.merges"]]
    assert merges and all({a, b, a + b} <= known for a, b in merges)
    assert keys["tokenizer.ggml.pre"] == "gpt-4o" and not keys["tokenizer.ggml.add_bos_token"]
    assert names[keys["tokenizer.ggml.eos_token_id"]] == "<|return|>"


@pytest.mark.slow
def test_the_released_vocabulary_comes_along_without_a_file(tmp_path):
    large = dataclasses.replace(TINY, vocab_size=201_088)
    synthesize(large, tmp_path / "large", "original")
    _, _, keys = opened(write_gguf(tmp_path / "large", tmp_path / "x.gguf"))
    names = keys["tokenizer.ggml.tokens"]
    assert (len(names), names[200_002], names[13]) == (201_088, "<|return|>", ".")
    assert len(keys["tokenizer.ggml.merges"]) == 199_998 - 256


# What is refused


def test_what_llamacpp_would_compute_differently_is_refused(tmp_path):
    synthesize(dataclasses.replace(TINY, swiglu_limit=6.0), tmp_path / "limit")
    with pytest.raises(CheckpointError, match=r"limit: swiglu_limit is 6\.0.*computes with 7\.0"):
        write_gguf(tmp_path / "limit", tmp_path / "x.gguf")


def test_columns_that_fill_no_block_are_refused(tmp_path):
    thin = dataclasses.replace(TINY, hidden_size=40, intermediate_size=24)
    synthesize_bf16(thin, tmp_path / "thin")
    with pytest.raises(CheckpointError, match=r"has 40 columns, but MXFP4 holds blocks of 32"):
        write_gguf(tmp_path / "thin", tmp_path / "x.gguf")
    heads = dataclasses.replace(TINY, head_dim=24, num_attention_heads=3, num_key_value_heads=1)
    synthesize(heads, tmp_path / "heads")
    write_gguf(tmp_path / "heads", tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"attn_output.* has 72 columns.*choose bf16"):
        write_gguf(tmp_path / "heads", tmp_path / "y.gguf", dense="q8_0")


def synthesize_bf16(config, path):
    return save(config, random_weights(config).__getitem__, path, "huggingface-bf16")


def test_a_foreign_vocabulary_is_refused(sources, tmp_path):
    small = Tokenizer({bytes([i]): i for i in range(256)}, {})
    small.save(tmp_path / "words.json")
    with pytest.raises(CheckpointError, match="ids up to 255, but vocab_size is 48"):
        write_gguf(
            sources["odd-original"], tmp_path / "x.gguf", tokenizer_path=tmp_path / "words.json"
        )
    cut = Tokenizer({bytes([i]): i for i in range(256)}, {}, r"\s+|\S+")
    cut.save(tmp_path / "cut.json")
    with pytest.raises(CheckpointError, match="no name for the pattern"):
        write_gguf(sources["nano"], tmp_path / "x.gguf", tokenizer_path=tmp_path / "cut.json")


def test_a_bad_target_is_refused_in_a_sentence(sources, tmp_path):
    (tmp_path / "taken.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match=r"taken\.gguf: already exists"):
        write_gguf(sources["nano"], tmp_path / "taken.gguf")
    assert (tmp_path / "taken.gguf").read_text() == "mine"
    with pytest.raises(ValueError, match=r"ends in \.gguf, not 'x'"):
        write_gguf(sources["nano"], tmp_path / "x")
    with pytest.raises(
        CheckpointError, match=r"x\.gguf: could not be written: .*taken\.gguf: File exists"
    ):
        write_gguf(sources["nano"], tmp_path / "taken.gguf" / "x.gguf")
    with pytest.raises(ValueError, match="dense must be one of bf16, q8_0, not 'q4'"):
        write_gguf(sources["nano"], tmp_path / "x.gguf", dense="q4")
    with pytest.raises(ValueError, match="rule must be"):
        write_gguf(sources["nano"], tmp_path / "x.gguf", rule="up")
    with pytest.raises(CheckpointError, match="no such file"):
        write_gguf(tmp_path / "nothing", tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["taken.gguf"]


def test_a_small_disk_is_refused_before_anything_is_written(sources, tmp_path, monkeypatch):
    free = staged.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(staged.shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match="make room or choose another disk"):
        write_gguf(sources["nano"], tmp_path / "x.gguf")
    assert not any(tmp_path.iterdir())


# Interruptions


def test_an_interrupted_writer_leaves_nothing(sources, tmp_path):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="Nothing was left behind"):
        write_gguf(sources["nano"], tmp_path / "x.gguf", progress=stop)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_what_a_killed_writer_leaves_does_not_open_and_the_next_one_clears_it(sources, tmp_path):
    code = (
        "import os, signal\nfrom gptoss.checkpoint.gguf import write_gguf\n"
        "def stop(done, total):\n  if done == total: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_gguf({str(sources['nano'])!r}, {str(tmp_path / 'x.gguf')!r}, progress=stop)"
    )
    here = os.environ | {"PYTHONPATH": str(Path(*gptoss.__path__).parent)}
    killed = subprocess.run([sys.executable, "-c", code], env=here)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.rglob("unfinished")
    with pytest.raises(ValueError, match="magic invalid"):
        GGUFReader(left)
    write_gguf(sources["nano"], tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_progress_ends_at_the_bytes_of_the_tensors(sources, tmp_path):
    said = []
    path = write_gguf(
        sources["nano"], tmp_path / "x.gguf", progress=lambda *numbers: said.append(numbers)
    )
    done = [d for d, _ in said]
    assert done == sorted(done) and said[-1][0] == said[-1][1] < path.stat().st_size


PEAK = """
import dataclasses, sys
from gptoss.checkpoint.gguf import write_gguf
from gptoss.checkpoint.synthesize import synthesize
from gptoss.model.config import gpt_oss_20b
if sys.argv[1] == "make":
    synthesize(dataclasses.replace(gpt_oss_20b(), num_hidden_layers=1), sys.argv[2])
else:
    write_gguf(*sys.argv[2:], dense=sys.argv[1])
    print(next(row.split()[1] for row in open("/proc/self/status") if "VmHWM" in row))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system keeps no peak")
def test_tensors_of_full_size_need_little_memory(tmp_path):
    here = os.environ | {"PYTHONPATH": str(Path(*gptoss.__path__).parent)}
    run = [sys.executable, "-c", PEAK]
    subprocess.run([*run, "make", tmp_path / "one"], check=True, env=here)
    for dense in ("bf16", "q8_0"):
        done = subprocess.run(
            [*run, dense, tmp_path / "one", tmp_path / f"{dense}.gguf"],
            check=True,
            capture_output=True,
            text=True,
            env=here,
        )
        assert int(done.stdout) * 1024 < 1e9, f"{dense}: {done.stdout} kB"
