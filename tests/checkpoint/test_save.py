import dataclasses
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import GptOssForCausalLM, Mxfp4Config

import gptoss
from gptoss.backends.protocol import Batch
from gptoss.backends.reference import ReferenceBackend
from gptoss.checkpoint import pieces, staged
from gptoss.checkpoint.open import LAYOUTS, open_checkpoint
from gptoss.checkpoint.save import convert, save
from gptoss.checkpoint.synthesize import reader, synthesize
from gptoss.errors import CheckpointError
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed, encode
from gptoss.model.weights import random_weights, specs

SMALL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=64,
    vocab_size=200,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=4,
    experts_per_token=2,
    intermediate_size=96,
    sliding_window=64,
    initial_context_length=256,
    rope_scaling_factor=8.0,
)
PACKED = ("original", "huggingface")
HERE = os.environ | {"PYTHONPATH": str(Path(*gptoss.__path__).parent)}
ODD = dataclasses.replace(SMALL, hidden_size=40, intermediate_size=24)


def numbers(stored):
    return stored.decode() if isinstance(stored, Packed) else stored.astype(np.float32)


def assert_same_values(found, expected, config=SMALL):
    for spec in specs(config):
        a, b = numbers(found(spec.name)), numbers(expected(spec.name))
        assert np.array_equal(a, b), spec.name


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One set of values in every layout, with a tokenizer beside it."""
    room = tmp_path_factory.mktemp("sources")
    (room / "tokenizer.json").write_text('{"version": "1.0"}')
    for layout in LAYOUTS:
        synthesize(SMALL, room / layout, layout, tokenizer_path=room / "tokenizer.json")
    return room


def left_behind(room):
    return [path.name for path in room.iterdir() if ".partial-" in path.name]


# Values


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_becomes_any_other_without_changing_a_value(sources, tmp_path, source, target):
    path = convert(sources / source, tmp_path / "x", target)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.layout.name, checkpoint.config) == (target, SMALL)
    assert_same_values(checkpoint.read, reader(SMALL))
    assert (path / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("source", PACKED)
@pytest.mark.parametrize("target", PACKED)
def test_between_packed_layouts_the_bytes_are_copied(tmp_path, source, target):
    awkward = reader(SMALL)("block.0.mlp.mlp1_weight")
    awkward.scales[0, 0, 0], awkward.blocks[0, 0, 0] = 255, 0x80  # a NaN, zeros of both signs
    draw, changed = reader(SMALL), {"block.0.mlp.mlp1_weight": awkward}
    save(SMALL, lambda name: changed.get(name) or draw(name), tmp_path / "a", source)
    convert(tmp_path / "a", tmp_path / "b", target)
    found = open_checkpoint(tmp_path / "b").read("block.0.mlp.mlp1_weight")
    assert np.array_equal(found.blocks, awkward.blocks)
    assert np.array_equal(found.scales, awkward.scales)


def test_a_chain_of_conversions_ends_where_it_began(sources, tmp_path):
    here = sources / "original"
    for i, layout in enumerate(["huggingface-bf16", "huggingface", "huggingface-bf16", "original"]):
        here = convert(here, tmp_path / str(i), layout)
    assert_same_values(open_checkpoint(here).read, reader(SMALL))


@pytest.mark.parametrize("rule", ["floor", "ceil", "least_squares"])
def test_dense_experts_are_packed_by_the_rule(tmp_path, rule):
    weights = random_weights(SMALL, seed=1)
    path = save(SMALL, weights.__getitem__, tmp_path / "x", "original", rule=rule)
    found = open_checkpoint(path).read("block.1.mlp.mlp1_weight")
    expected = encode(weights["block.1.mlp.mlp1_weight"], rule)
    assert np.array_equal(found.blocks, expected.blocks)
    assert np.array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_wider_values_are_rounded_to_the_nearest_bfloat16_ties_to_even(tmp_path, dtype):
    weights = random_weights(ODD, dtype=dtype)
    weights["norm.scale"][:4] = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-10]
    path = save(ODD, weights.__getitem__, tmp_path / "x", "huggingface-bf16")
    read = open_checkpoint(path).read
    assert read("norm.scale")[:4].astype(float).tolist() == [1, 1 + 2**-6, -1, 1 + 2**-7]
    assert_same_values(read, lambda name: weights[name].astype(ml_dtypes.bfloat16), ODD)


def test_two_threads_and_slabs_smaller_than_a_tensor_change_nothing(tmp_path, monkeypatch, sources):
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces, "STRIP", 7)
    for layout in LAYOUTS:
        path = convert(sources / "huggingface-bf16", tmp_path / layout, layout)
        assert_same_values(open_checkpoint(path).read, reader(SMALL))
        back = convert(path, tmp_path / f"{layout}-back", "huggingface-bf16")
        assert_same_values(open_checkpoint(back).read, reader(SMALL))


# Files


@pytest.mark.parametrize("shard_bytes", [None, 40_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_official_library_sees_the_same(tmp_path, layout, shard_bytes):
    path = synthesize(SMALL, tmp_path / "x", layout, shard_bytes=shard_bytes)
    files = sorted(path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes is not None and layout != "original")
    checkpoint, seen = open_checkpoint(path), {}
    for file in files:
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert header % 8 == 0
        with safe_open(file, "pt") as theirs:
            format = "mlx" if layout == "mlx" else "pt"
            assert theirs.metadata() == (None if layout == "original" else {"format": format})
            for name in theirs.keys():  # noqa: SIM118 (it is no dict)
                seen[name] = file.name
                ours = checkpoint.tensors[name]
                assert ours.aligned
                got = theirs.get_tensor(name)
                assert tuple(got.shape) == ours.shape
                raw = got.view(torch.uint8).numpy()
                assert raw.tobytes() == ours.array().tobytes(), name
    assert set(seen) == {entry.name for entry in LAYOUTS[layout].entries(SMALL)}
    if len(files) > 1:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == seen
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in checkpoint.tensors.values())
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"


def test_shards_respect_their_limit_and_keep_blocks_beside_scales(tmp_path):
    path = synthesize(SMALL, tmp_path / "x", shard_bytes=60_000)
    where = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(where.values()):
        held = [name for name, place in where.items() if place == file]
        assert (path / file).stat().st_size < 60_000 + 4096 or len(held) <= 3, file
    for name, file in where.items():
        assert where[name.replace("_scales", "_blocks")] == file


def test_only_a_vocabulary_with_the_special_tokens_gets_a_generation_config(tmp_path):
    whole = dataclasses.replace(SMALL, num_hidden_layers=1, vocab_size=201_088)
    for layout in ("huggingface", "original"):
        path = synthesize(whole, tmp_path / layout, layout)
        assert (path / "generation_config.json").exists() == (layout == "huggingface")
    path = synthesize(SMALL, tmp_path / "small")
    assert not (path / "generation_config.json").exists()


def test_what_lies_beside_the_tokenizer_comes_along_to_hugging_face(sources, tmp_path):
    source = shutil.copytree(sources / "huggingface", tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    dense = convert(source, tmp_path / "dense", "huggingface-bf16")
    assert (dense / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((dense / "generation_config.json").read_text()) == {"temperature": 0.5}
    original = convert(source, tmp_path / "original", "original")
    assert sorted(p.name for p in original.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("layout", ["huggingface-bf16", "huggingface"])
@pytest.mark.parametrize("shard_bytes", [None, 60_000])
def test_transformers_computes_the_same_logits(tmp_path, layout, shard_bytes):
    path = synthesize(SMALL, tmp_path / "x", layout, seed=5, shard_bytes=shard_bytes)
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, 90)
    unpack = {"quantization_config": Mxfp4Config(dequantize=True)} if layout in PACKED else {}
    model = GptOssForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, attn_implementation="eager", **unpack
    )
    with torch.no_grad():
        theirs = model.float()(torch.tensor(tokens[None])).logits[0].numpy()
    ours = ReferenceBackend(SMALL, open_checkpoint(path).read)
    cache = ours.new_cache(max_tokens=90)
    logits = ours.forward(Batch.of([tokens], [0], [cache.open()], range(90)), cache)
    assert np.abs(logits - theirs).max() < 1e-4


# Refusals


@pytest.mark.parametrize("layout", ["original", "huggingface"])
def test_columns_that_mxfp4_cannot_hold_are_refused_before_anything_is_written(tmp_path, layout):
    with pytest.raises(CheckpointError, match=r"hidden_size is 40.*choose huggingface-bf16"):
        save(ODD, random_weights(ODD).__getitem__, tmp_path / "x", layout)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_packed_is_named(tmp_path):
    weights = random_weights(SMALL)
    weights["block.1.mlp.mlp2_weight"][3, 2, 1] = np.nan
    with pytest.raises(CheckpointError, match=r"block\.1\.mlp\.mlp2_weight: MXFP4 has no inf"):
        save(SMALL, weights.__getitem__, tmp_path / "x", "original")
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    weights = random_weights(SMALL) | {"block.0.attn.sinks": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match=r"block\.0\.attn\.sinks must have the shape \(4,\)"):
        save(SMALL, weights.__getitem__, tmp_path / "x", "original")
    assert not list(tmp_path.iterdir())


def too_large():
    weights = random_weights(ODD)
    weights["block.1.attn.out.bias"][3] = 3.4e38  # finite, but not in bfloat16
    return ODD, weights, "block.1.attn.out.bias"


def infinite(dtype=np.float32):
    weights = random_weights(ODD, dtype=dtype)
    weights["block.0.attn.qkv.weight"][-1, -1] = -np.inf
    return ODD, weights, "block.0.attn.qkv.weight"


def no_number():
    weights = random_weights(ODD)
    weights["block.1.mlp.mlp1_weight"][-1, 2, 3] = np.nan
    return ODD, weights, "block.1.mlp.mlp1_weight"


def scaled(scale, code):
    name, draw = "block.1.mlp.mlp2_weight", reader(SMALL)
    weights = {spec.name: draw(spec.name) for spec in specs(SMALL)}
    weights[name].scales[-1, -1, -1], weights[name].blocks[-1, -1, -1] = scale, code
    return SMALL, weights, name


@pytest.mark.parametrize(
    "case",
    [
        too_large,
        infinite,
        lambda: infinite(ml_dtypes.bfloat16),
        no_number,
        lambda: scaled(253, 0x66),  # 4 * 2**126
        lambda: scaled(254, 0x0C),  # -2 * 2**127
        lambda: scaled(255, 0x00),
    ],
)
def test_what_is_not_finite_in_bfloat16_is_refused_by_name(tmp_path, case):
    config, weights, name = case()
    with pytest.raises(CheckpointError, match=rf"^{re.escape(name)}: holds an infinity, a NaN"):
        save(config, weights.__getitem__, tmp_path / "x", "huggingface-bf16")
    assert not list(tmp_path.iterdir())


def test_the_largest_numbers_of_both_formats_survive(tmp_path):
    _, weights, name = scaled(253, 0x55)  # 3 * 2**126
    path = save(SMALL, weights.__getitem__, tmp_path / "x", "huggingface-bf16")
    assert_same_values(open_checkpoint(path).read, weights.__getitem__)
    assert open_checkpoint(path).dense(name).max() == 3 * 2.0**126


@pytest.mark.parametrize("source", ["original", "huggingface-bf16"])
@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"rule": "zzz"}, "rule must be one of floor, ceil, least_squares, not 'zzz'"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1, or None, not 0"),
        ({"shard_bytes": -5}, "shard_bytes must be at least 1, or None, not -5"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    sources, tmp_path, source, wrong, said
):
    with pytest.raises(ValueError, match=said):
        convert(sources / source, tmp_path / "new" / "x", "huggingface", **wrong)
    assert not list(tmp_path.iterdir())


def test_a_system_without_advice_on_memory_converts_all_the_same(sources, tmp_path, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    for layout in LAYOUTS:
        path = convert(sources / "huggingface", tmp_path / layout, layout)
        assert_same_values(open_checkpoint(path).read, reader(SMALL))


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout must be one of original, huggingface, "):
        synthesize(SMALL, tmp_path / "x", "gguf")


def test_nothing_that_exists_is_touched(sources, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(sources / "original")
    (tmp_path / "nowhere").symlink_to(tmp_path / "full" / "file")
    for name in ("file", "full", "link", "nowhere"):
        with pytest.raises(CheckpointError, match="already exists as a"):
            convert(sources / "huggingface", tmp_path / name, "original")
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "mine"
    assert not left_behind(tmp_path) and not left_behind(sources)


def test_an_empty_directory_may_be_the_target(sources, tmp_path):
    (tmp_path / "x").mkdir()
    assert_same_values(
        open_checkpoint(convert(sources / "original", tmp_path / "x", "huggingface")).read,
        reader(SMALL),
    )
    convert(sources / "original", tmp_path / "new" / "deep" / "x", "huggingface")


def test_a_checkpoint_is_not_converted_onto_itself(sources, tmp_path):
    (tmp_path / "link").symlink_to(sources / "original")
    source = sources / "original"
    for a, b in [
        (source, source),
        (source / "model.safetensors", source),
        (source, tmp_path / "link"),
        (tmp_path / "link", source),
        (source, source / ".." / "original"),
    ]:
        with pytest.raises(CheckpointError, match="onto itself"):
            convert(a, b, "huggingface")
    assert_same_values(open_checkpoint(source).read, reader(SMALL))


# Accidents


def test_a_disk_too_small_is_known_beforehand(sources, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, but the disk has 0\.00 GB free"):
        convert(sources / "original", tmp_path / "x", "huggingface")
    assert not list(tmp_path.iterdir())


CONVERT = "from gptoss.checkpoint.save import convert; import sys; convert(*sys.argv[1:4])"
FULL_DISK = """
import os, shutil, sys
from gptoss.errors import CheckpointError
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9)  # as if others filled it
try:
    convert(*sys.argv[1:4])
except CheckpointError as error:
    print(error, os.listdir(os.path.dirname(sys.argv[2])))
"""


def test_a_disk_that_fills_up_leaves_nothing_but_a_sentence(sources, tmp_path):
    """A real disk of 200 kB, in a namespace of its own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=200k none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount]).returncode:
        pytest.skip("this system lets us mount no disk of our own")
    command = [sys.executable, "-c", CONVERT.replace("; convert(*sys.argv[1:4])", FULL_DISK)]
    command += [str(sources / "huggingface"), str(tmp_path / "x"), "huggingface-bf16"]
    done = subprocess.run(
        [*unshare, f'{mount} && "$@"', "sh", *command], capture_output=True, text=True, env=HERE
    )
    assert done.returncode == 0, done.stderr
    said = f"{tmp_path / 'x'}: could not be written: the disk is full. Nothing was left behind. []"
    assert done.stdout.strip() == said


def test_a_limit_on_file_sizes_leaves_nothing_but_a_sentence(sources, tmp_path):
    pytest.importorskip("resource", reason="this system has no such limits")
    limited = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (200_000, 200_000)); " + CONVERT
    done = run(limited, sources / "huggingface", tmp_path / "x", "huggingface-bf16")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.endswith("could not be written: File too large. Nothing was left behind.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_the_disk_leaves_nothing_but_a_sentence(sources, tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match=r"x: could not be written: Input/output error\. "):
        convert(sources / "original", tmp_path / "x", "huggingface")
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_file_names_that_file(sources, tmp_path):
    def lost(done, total):
        (tmp_path / "elsewhere" / "log").read_bytes()

    with pytest.raises(CheckpointError, match=r"x: could not be written: .*elsewhere.log: No such"):
        convert(sources / "original", tmp_path / "x", "huggingface", progress=lost)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_leaves_nothing(sources, tmp_path, error):
    def stop(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(error) as caught:
        convert(sources / "original", tmp_path / "x", "huggingface-bf16", progress=stop)
    assert not list(tmp_path.iterdir())
    if error is KeyboardInterrupt:
        assert str(caught.value).endswith("x: interrupted. Nothing was left behind.")


KILLED = """
import os, signal, sys
from gptoss.checkpoint.save import convert
source, target, layout, call, moment = sys.argv[1:]
left = int(moment)

def count(*_):
    global left
    left -= 1
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(function):
    return lambda *arguments: (count(), function(*arguments))[1]

if call != "progress":
    setattr(os, call, counted(getattr(os, call)))
convert(source, target, layout, progress=count if call == "progress" else None)
"""


# Of a conversion's own steps: pieces written; tensors, tokenizer, config and directory synced.
MOMENTS = {"progress": (1, 17, 33), "fsync": (1, 2, 3, 4), "rename": (1,)}


@pytest.mark.parametrize(
    "call, moment",
    [(call, moment) for call, moments in MOMENTS.items() for moment in moments],
)
def test_a_killed_conversion_leaves_nothing_that_opens(sources, tmp_path, call, moment):
    target = tmp_path / "x"
    done = run(KILLED, sources / "huggingface", target, "original", call, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    assert len(left_behind(tmp_path)) == 1
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / left_behind(tmp_path)[0])
    convert(sources / "huggingface", target, "original")
    assert not left_behind(tmp_path)
    assert_same_values(open_checkpoint(target).read, reader(SMALL))


def test_a_conversion_still_running_is_left_alone(sources, tmp_path):
    other = tmp_path / ".x.partial-1"
    other.mkdir()
    lock = staged._lock(other)
    convert(sources / "original", tmp_path / "x", "huggingface")
    assert left_behind(tmp_path) == [other.name]
    os.close(lock)
    shutil.rmtree(tmp_path / "x")
    convert(sources / "original", tmp_path / "x", "huggingface")
    assert not left_behind(tmp_path)


def test_a_neighbour_of_a_similar_name_is_left_alone(sources, tmp_path):
    for name in (".[x].partial-1", ".x.partial-1", ".[x]y.partial-1", "[x].partial-1"):
        (tmp_path / name).mkdir()
    convert(sources / "original", tmp_path / "[x]", "huggingface")
    assert sorted(left_behind(tmp_path)) == [".[x]y.partial-1", ".x.partial-1", "[x].partial-1"]


def test_a_missing_tokenizer_is_known_beforehand(sources, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.json: there is no such tokenizer\.json"):
        synthesize(SMALL, tmp_path / "x", tokenizer_path=tmp_path / "nowhere.json")
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_the_bytes_promised(sources, tmp_path):
    for layout in LAYOUTS:
        calls = []
        convert(
            sources / "huggingface-bf16",
            tmp_path / layout,
            layout,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        done, totals = zip(*calls, strict=True)
        assert list(done) == sorted(done)
        assert {done[-1]} == set(totals)


def test_the_mapped_source_does_not_pile_up_in_memory(tmp_path):
    """64 MB of experts pass through; less than half of them may ever be resident."""
    wide = dataclasses.replace(SMALL, hidden_size=1024, intermediate_size=1024, num_experts=20)
    source = synthesize(wide, tmp_path / "source")
    done = run(
        "import sys; from gptoss.checkpoint.save import convert\n"
        "def resident(): return [l for l in open('/proc/self/status') if l[:7] == 'RssFile'][0]\n"
        "seen = [resident()]\n"
        "convert(*sys.argv[1:], progress=lambda *_: seen.append(resident()))\n"
        "kb = [int(line.split()[1]) for line in seen]\n"
        "print((max(kb) - kb[0]) * 1024)",
        source,
        tmp_path / "target",
        "original",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 45e6


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=HERE)
