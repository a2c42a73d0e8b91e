"""Opening checkpoints: one set of weights whatever the layout, one sentence whatever the damage."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptoss.checkpoint.layout import Layout
from gptoss.checkpoint.open import LAYOUTS, layout_of, open_checkpoint
from gptoss.errors import CheckpointError
from gptoss.model.config import gpt_oss_20b
from gptoss.model.mxfp4 import Packed
from gptoss.model.weights import specs
from tests.checkpoint.by_hand import TINY, canonical, glued, save, stored, write

WEIGHTS = canonical()
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint to damage: Hugging Face's packed layout in three shards."""
    return write(tmp_path / "model", LAYOUTS["huggingface"], WEIGHTS, shards=3)


def numbers(x: Any) -> np.ndarray:
    return x.decode(np.float32) if isinstance(x, Packed) else x.astype(np.float32)


@pytest.mark.parametrize("shards", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_weights(tmp_path: Path, layout: Layout, shards: int) -> None:
    opened = open_checkpoint(write(tmp_path / "m", layout, WEIGHTS, shards=shards))
    assert (opened.layout, opened.config) == (layout, TINY)
    assert opened.nbytes == sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(opened.files) == max(shards, 1)
    for name, expected in WEIGHTS.items():
        found = opened.read(name)
        assert isinstance(found, Packed) is (isinstance(expected, Packed) and layout.packed)
        assert found.shape == expected.shape
        if isinstance(found, Packed):
            np.testing.assert_array_equal(found.blocks, expected.blocks)
            np.testing.assert_array_equal(found.scales, expected.scales)
        np.testing.assert_array_equal(numbers(found), numbers(expected))
        np.testing.assert_array_equal(opened.dense(name), numbers(expected))
        np.testing.assert_array_equal(opened.get(name).shape, expected.shape)
    opened.check()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_only_fused_rows_are_copied(tmp_path: Path, layout: Layout) -> None:
    opened = open_checkpoint(write(tmp_path / "m", layout, WEIGHTS))
    copied = set()
    for spec in specs(TINY):
        x = opened.read(spec.name)
        x = x.blocks if isinstance(x, Packed) else x
        copied |= {spec.name.split(".", 2)[-1]} if x.flags.writeable else set()
    qkv, mlp1 = {"attn.qkv.weight", "attn.qkv.bias"}, {"mlp.mlp1_weight", "mlp.mlp1_bias"}
    fused = {"original": set(), "mlx": qkv | mlp1}
    assert copied == fused.get(layout.name, qkv)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dense_tensors_may_have_any_of_three_dtypes(tmp_path: Path, dtype: Any) -> None:
    path = write(tmp_path / "m", LAYOUTS["huggingface"], WEIGHTS)
    tensors = stored(LAYOUTS["huggingface"], WEIGHTS)
    cast = {n: x if x.dtype == np.uint8 else x.astype(dtype) for n, x in tensors.items()}
    save(path / "model.safetensors", cast)
    opened = open_checkpoint(path)
    found = opened.read("block.1.attn.qkv.weight")
    assert found.dtype == dtype
    expected = WEIGHTS["block.1.attn.qkv.weight"].astype(dtype).astype(np.float64)
    np.testing.assert_array_equal(opened.dense("block.1.attn.qkv.weight", np.float64), expected)


def test_one_file_opens_with_the_config_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path / "m", LAYOUTS["original"], WEIGHTS) / "model.safetensors"
    opened = open_checkpoint(str(path))
    assert (opened.path, opened.files, opened.tokenizer_path) == (path, (path,), None)
    np.testing.assert_array_equal(opened.read("norm.scale"), WEIGHTS["norm.scale"])


def test_the_tokenizer_beside_the_weights_is_found(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert open_checkpoint(folder).tokenizer_path == folder / "tokenizer.json"


def test_a_folder_within_is_never_taken_for_the_checkpoint(folder: Path) -> None:
    """The published repository has both layouts: Hugging Face's on top, ``original/`` within."""
    other = canonical(seed=1)
    write(folder / "original", LAYOUTS["original"], other)
    for path, weights in {folder: WEIGHTS, folder / "original": other}.items():
        np.testing.assert_array_equal(
            open_checkpoint(path).read("norm.scale"), weights["norm.scale"]
        )
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no .safetensors file itself, but .*/original has"):
        open_checkpoint(folder)


def test_links_into_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        (tmp_path / f"blob{i}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blob{i}")
    np.testing.assert_array_equal(
        open_checkpoint(snapshot).read("norm.scale"), WEIGHTS["norm.scale"]
    )


def test_a_tensor_is_got_by_the_files_name_too(folder: Path) -> None:
    opened = open_checkpoint(folder)
    queries = opened.get("model.layers.0.self_attn.q_proj.bias")
    rows = TINY.num_attention_heads * TINY.head_dim
    np.testing.assert_array_equal(queries, WEIGHTS["block.0.attn.qkv.bias"][:rows])
    scales = opened.get("model.layers.1.mlp.experts.down_proj_scales")
    np.testing.assert_array_equal(scales, WEIGHTS["block.1.mlp.mlp2_weight"].scales)


@pytest.mark.parametrize("ask", ["get", "read", "dense"])
def test_an_unknown_name_is_told_its_neighbours(folder: Path, ask: str) -> None:
    opened = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"no tensor 'block.0.attn.qvk.weight'. Did you") as e:
        getattr(opened, ask)("block.0.attn.qvk.weight")
    assert "block.0.attn.qkv.weight" in str(e.value)
    with pytest.raises(CheckpointError, match=r"no tensor '#'\.$"):
        getattr(opened, ask)("#")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_known_by_its_names(layout: Layout) -> None:
    assert layout_of(entry.name for entry in layout.entries(TINY)) is layout


def test_names_of_no_layout_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no tensors; this is no gpt-oss"):
        layout_of([])
    with pytest.raises(CheckpointError, match="'bert.layer' and 1 more|'bert.layer', 'x'"):
        layout_of(["bert.layer", "x"])
    with pytest.raises(CheckpointError, match="mixes the original layout"):
        layout_of(["block.0.attn.sinks", "model.layers.0.self_attn.sinks"])


def test_what_transformers_saves_opens_equal(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**TINY.to_json("huggingface", packed=False))
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    opened = open_checkpoint(tmp_path)
    assert opened.layout is LAYOUTS["huggingface-bf16"] and len(opened.files) > 1
    assert opened.config == TINY
    theirs = {name: p.detach().float().numpy() for name, p in model.state_dict().items()}
    for entry in opened.layout.entries(TINY):
        expected = theirs.pop(entry.name)
        if entry.part == "transposed":
            expected = expected.transpose(0, 2, 1)
        found = opened.dense(entry.canonical)
        found = found[slice(*entry.rows)] if entry.part == "rows" else found
        np.testing.assert_array_equal(found, expected)
    assert not theirs


# Damage to a directory: each does one thing to a good one, and expects one sentence.
Damage = Callable[[Path], object]


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def place(name: str, file: Any) -> Damage:
    return edit(INDEX, lambda index: index["weight_map"].update({name: file}))


def rewrite(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """The same weights in a single file, with some of its tensors changed."""

    def damage(folder: Path) -> None:
        for file in folder.glob("model*"):
            file.unlink()
        tensors = stored(LAYOUTS["huggingface"], WEIGHTS)
        change(tensors)
        save(folder / "model.safetensors", tensors)

    return damage


def unshared(folder: Path) -> None:
    """The shards without their index, the first one's tensors also in a fourth file."""
    (folder / INDEX).unlink()
    shutil.copy(shard(folder), folder / "more.safetensors")


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"model-{number:05}-of-00003.safetensors"


SINKS = "model.layers.0.self_attn.sinks"
BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json: not valid JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 99_999), "too deeply"),
    "config too large": (lambda f: os.truncate(f / "config.json", 1 << 40), "are too many"),
    "config a pointer": (
        lambda f: (f / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "config.json: this is a git-lfs pointer",
    ),
    "config a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "a pipe or a device",
    ),
    "config a directory": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "found a directory",
    ),
    "config of another model": (
        edit("config.json", lambda c: c.update(model_type="llama")),
        "'llama' model",
    ),
    "config number missing": (
        edit("config.json", lambda c: c.pop("head_dim")),
        "head_dim are miss",
    ),
    "config number impossible": (
        edit("config.json", lambda c: c.update(head_dim=-1)),
        "head_dim must be positive",
    ),
    "config of another size": (
        edit("config.json", lambda c: c.update(vocab_size=47)),
        r"2 tensors of another shape .*model.embed_tokens.weight \[48, 64\] for \[47, 64\]",
    ),
    "config of another depth": (
        edit("config.json", lambda c: c.update(num_hidden_layers=1, layer_types=None)),
        r"unknown tensors \('model.layers.1.*\.\.\.\)",
    ),
    "width that cannot be packed": (
        edit("config.json", lambda c: c.update(intermediate_size=33)),
        "MXFP4 packs blocks of 32, but .*intermediate_size is 33",
    ),
    "index damaged": (lambda f: (f / INDEX).write_text("{"), "index.json: not valid JSON"),
    "index without map": (edit(INDEX, lambda i: i.pop("weight_map")), "weight_map must map"),
    "index of numbers": (place(SINKS, 3), "weight_map must map"),
    "index names no tensor": (edit(INDEX, lambda i: i["weight_map"].clear()), "does not know"),
    "index leads out": (place(SINKS, "../model.safetensors"), "not a .safetensors file of this"),
    "index leads in": (place(SINKS, "original/model.safetensors"), "not a .safetensors file"),
    "index absolute": (place(SINKS, "/etc/x.safetensors"), "not a .safetensors file of this"),
    "index of Windows": (place(SINKS, "C:\\x.safetensors"), "not a .safetensors file of this"),
    "index with null": (place(SINKS, "\0.safetensors"), "not a .safetensors file of this"),
    "index with dots": (place(SINKS, ".."), "not a .safetensors file of this"),
    "index too long a name": (place(SINKS, "x" * 999 + ".safetensors"), "File name too long"),
    "index names another shard": (
        place("lm_head.weight", "model-00001-of-00003.safetensors"),
        r"'lm_head.weight' should be in model-00001\S+, but it is in model-0000[23]",
    ),
    "index names a ghost": (
        place("ghost", "model-00001-of-00003.safetensors"),
        "'ghost' should be in .*, but it is in no file",
    ),
    "index forgets a tensor": (
        edit(INDEX, lambda i: i["weight_map"].pop(SINKS)),
        f"does not know the tensors '{SINKS}'",
    ),
    "shard missing": (
        lambda f: shard(f, 2).unlink(),
        "1 of 3 files are missing: 'model-00002-of-00003.safetensors'",
    ),
    "shard missing, no index": (
        lambda f: (shard(f, 2).unlink(), (f / INDEX).unlink()),
        "2 of 3 files like model-00001-of-00003.safetensors are there",
    ),
    "shard a pointer": (
        lambda f: shard(f).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git-lfs pointer",
    ),
    "shard cut off": (lambda f: os.truncate(shard(f), 5000), "incomplete"),
    "shard a directory": (lambda f: (shard(f).unlink(), shard(f).mkdir()), "found a directory"),
    "shard still downloading": (
        lambda f: shard(f, 2).rename(shard(f, 2).with_suffix(".safetensors.incomplete")),
        r"files are missing.* \S+00002-of-00003.safetensors.incomplete lies there: an unfinished",
    ),
    "hub still downloading": (
        lambda f: (
            (f / ".cache/huggingface/download").mkdir(parents=True),
            shard(f, 2).rename(f / ".cache/huggingface/download/abc.incomplete"),
        ),
        "files are missing.*abc.incomplete lies there: an unfinished",
    ),
    "file beside the index": (
        lambda f: shutil.copy(shard(f), f / "model.safetensors"),
        "does not know 'model.safetensors', which lies beside it",
    ),
    "tensor in two files": (unshared, r"more.safetensors: \S+ is also in model-00001-of-00003"),
    "tensor missing": (rewrite(lambda t: t.pop(SINKS)), rf"1 missing tensors \('{SINKS}'\)"),
    "tensor too many": (
        rewrite(lambda t: t.update(extra=np.zeros(3, np.float32))),
        r"1 unknown tensors \('extra'\)",
    ),
    "tensor misshapen": (
        rewrite(lambda t: t.update({SINKS: np.zeros(7, np.float32)})),
        rf"1 tensors of another shape than the config calls for \({SINKS} \[7\] for \[8\]\)",
    ),
    "tensor transposed": (
        rewrite(lambda t: t.update({Q: t[Q].T})),
        r"another shape .*q_proj.weight \[64, 256\] for \[256, 64\]",
    ),
    "dense tensor of bytes": (
        rewrite(lambda t: t.update({SINKS: np.zeros(8, np.uint8)})),
        f"{SINKS} is U8, not BF16 or F32 or F16",
    ),
    "dense tensor of doubles": (
        rewrite(lambda t: t.update({SINKS: np.zeros(8)})),
        f"{SINKS} is F64, not BF16 or F32 or F16",
    ),
    "packed tensor of floats": (
        rewrite(lambda t: t.update({BLOCKS: t[BLOCKS].astype(np.float32)})),
        f"{BLOCKS} is F32, not U8",
    ),
    "queries of another dtype": (
        rewrite(lambda t: t.update({Q: t[Q].astype(np.float32)})),
        "the rows of block.0.attn.qkv.weight differ",
    ),
    "half packed": (
        rewrite(lambda t: t.update({BLOCKS.removesuffix("_blocks"): t.pop(BLOCKS)})),
        r"1 missing tensors \('model.layers.0.mlp.experts.down_proj_blocks'\); 1 unknown",
    ),
    "both layouts": (
        rewrite(lambda t: t.update(stored(LAYOUTS["original"], WEIGHTS))),
        "mixes the original layout",
    ),
    "another model": (
        rewrite(lambda t: (t.clear(), t.update(weight=np.zeros(3, np.float32)))),
        "tensors called 'weight'; this is no gpt-oss checkpoint",
    ),
    "no tensors": (rewrite(dict.clear), "no tensors; this is no gpt-oss checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_one_clear_error(folder: Path, damage: str) -> None:
    spoil, message = DAMAGED[damage]
    open_checkpoint(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


def test_a_single_shard_says_what_is_missing(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\d+ missing tensors \(.*give the directory"):
        open_checkpoint(shard(folder))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("model.gguf", b"GGUF\3\0\0\0" + bytes(64), "GGUF file. Only safetensors"),
        ("pytorch_model.bin", b"PK\3\4\x14\0\x08\x08\0\0" + bytes(64), "zip archive, as PyTorch"),
        ("config.json", b"{}", "config.json: holds no weights. Give a directory"),
        ("notes.txt", b"nothing of interest", "no safetensors file"),
    ],
)
def test_other_files_are_told_what_is_read(
    tmp_path: Path, name: str, raw: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / name)


def test_a_directory_without_weights_is_told_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(CheckpointError, match="no such file or directory. Give a directory"):
        open_checkpoint(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="the directory is empty. Give a directory"):
        open_checkpoint(path)
    (path / "config.json").write_text(json.dumps(TINY.to_json()))
    with pytest.raises(CheckpointError, match="has no .safetensors file. Give a directory"):
        open_checkpoint(path)
    for name, kind in {"pytorch_model.bin": "PyTorch's pickled", "x.gguf": "GGUF"}.items():
        (path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"has {kind} files.*Give a directory"):
            open_checkpoint(path)


def test_a_half_written_checkpoint_never_opens(tmp_path: Path) -> None:
    """A writer works in a hidden sibling and renames it when config.json, the last file, is in."""
    path = write(tmp_path / ".model.partial-123", LAYOUTS["original"], WEIGHTS)
    for given in (path, path / "model.safetensors"):
        with pytest.raises(CheckpointError, match="still being written"):
            open_checkpoint(given)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(CheckpointError, match="still being written"):
        open_checkpoint(link)
    open_checkpoint(path.rename(tmp_path / "model"))


def test_an_unfinished_download_beside_a_whole_checkpoint_does_not_matter(folder: Path) -> None:
    (folder / "model.gguf.part").write_bytes(b"")
    (folder / "._model.safetensors").write_bytes(b"what a Mac leaves on foreign disks")
    open_checkpoint(folder)


def test_opening_looks_at_no_number_and_check_at_all(tmp_path: Path) -> None:
    spoiled: dict[str, tuple[str, Any]] = {
        "lm_head.weight": ("BF16", np.nan),
        SINKS: ("BF16", -np.inf),
        "model.layers.1.mlp.experts.gate_up_proj_scales": ("U8", 255),
    }
    for name, (_, value) in spoiled.items():
        path = write(tmp_path / "m", LAYOUTS["huggingface"], WEIGHTS)
        tensors = stored(LAYOUTS["huggingface"], WEIGHTS)
        tensors[name] = tensors[name].copy()
        tensors[name].flat[5] = value
        save(path / "model.safetensors", tensors)
        opened = open_checkpoint(path)
        at = [int(i) for i in np.unravel_index(5, tensors[name].shape)]
        with pytest.raises(CheckpointError) as caught:
            opened.check()
        assert f"'{name}' at {at} is {value}, which" in str(caught.value)


def test_checking_goes_piece_by_piece(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("gptoss.checkpoint.open.CHUNK", 100)
    open_checkpoint(folder).check()
    tensors = stored(LAYOUTS["huggingface"], WEIGHTS)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][-1, -1] = np.inf
    path = write(tmp_path / "m", LAYOUTS["huggingface"], WEIGHTS)
    save(path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' at \[47, 63\] is inf"):
        open_checkpoint(path).check()


def test_the_extremes_of_every_format_pass_the_check(tmp_path: Path) -> None:
    layout = LAYOUTS["huggingface"]
    path, tensors = write(tmp_path / "m", layout, WEIGHTS), stored(layout, WEIGHTS)
    for name, x in tensors.items():
        if name.endswith("_scales"):
            tensors[name] = np.resize(np.array([0, 254], np.uint8), x.shape)
        elif name.endswith("bias"):
            tensors[name] = np.resize(np.array([65504, -65504], np.float16), x.shape)
        elif not name.endswith("_blocks"):
            tensors[name] = np.full(x.shape, np.finfo(np.float32).max)
    save(path / "model.safetensors", tensors)
    open_checkpoint(path).check()


def sparse_20b(folder: Path) -> int:
    """gpt-oss-20b's real header over a body of nothing: full size, no disk."""
    config, body = gpt_oss_20b(), 0
    header = {}
    for entry in LAYOUTS["original"].entries(config):
        n = int(np.prod(entry.shape)) * (1 if entry.dtype == "U8" else 2)
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": [*entry.shape],
            "data_offsets": [body, body + n],
        }
        body += n
    raw = glued(header, b"")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(raw)
    os.truncate(folder / "model.safetensors", len(raw) + body)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    return len(raw) + body


def resident(of: Path | None = None) -> int:
    """Bytes of this process in memory, or of its views of one file."""
    total, counts = 0, of is None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            counts = of is None or line.endswith(str(of))
        elif first == "Rss:" and counts:
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc to measure")
def test_opening_20b_touches_headers_only(tmp_path: Path) -> None:
    size = sparse_20b(tmp_path / "20b")
    before = resident()
    opened = open_checkpoint(tmp_path / "20b")
    assert opened.nbytes == size > 13_000_000_000
    assert resident(opened.files[0]) == 0, "a byte of the file was read through the mapping"
    assert resident() - before < 100 << 20
    experts = opened.read("block.7.mlp.mlp1_weight")
    assert experts.shape == (32, 5760, 2880)
    assert not experts[3].blocks[:100].any()
    assert 0 < resident(opened.files[0]) < 16 << 20, "reading some rows of one expert read more"
    opened.tensors["block.7.mlp.mlp1_weight.blocks"].release()
    assert resident(opened.files[0]) == 0


def test_a_config_larger_than_its_weights_is_an_error_not_a_wait(tmp_path: Path) -> None:
    path = write(tmp_path / "m", LAYOUTS["original"], WEIGHTS)
    big = replace(TINY, num_hidden_layers=4096, vocab_size=1 << 22)
    (path / "config.json").write_text(json.dumps(big.to_json()))
    with pytest.raises(CheckpointError, match=r"\d+ missing tensors"):
        open_checkpoint(path)
