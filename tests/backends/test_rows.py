"""Rows of a cache as files, in every room: what goes on from a file is as if it had never left."""

import json
from dataclasses import replace

import numpy as np
import pytest

from gptoss.backends import load_backend, rows
from gptoss.backends.protocol import Batch
from gptoss.backends.rows import load_row, save_row
from gptoss.checkpoint import safetensors
from gptoss.errors import BackendUnavailable, CacheFull, CheckpointError, GptOssError
from gptoss.model.weights import random_weights
from tests.conftest import TINY

CONFIG = replace(TINY, head_dim=32, sliding_window=16)
MADE = {"model": "abc", "dtype": "float32", "kv": None}
KINDS = {
    "reference": {},
    "native": {"precision": "exact", "kv": "float32"},
    "native-int8": {"precision": "exact", "kv": "int8"},
    "torch": {"dtype": "float32"},
    "torch-bfloat16": {"dtype": "bfloat16"},
    "mlx": {"dtype": "float32"},
    "mlx-bfloat16": {"dtype": "bfloat16"},
    "mlx-int8": {"dtype": "bfloat16", "kv": "int8"},
}
TEXT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 600).tolist()


@pytest.fixture(params=KINDS)
def backend(request):
    name = request.param.partition("-")[0]
    read = random_weights(CONFIG).__getitem__
    try:
        return load_backend(name, CONFIG, read, **KINDS[request.param])
    except BackendUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def cache(backend):
    """With room for one row of the text."""
    return backend.new_cache(max_tokens=700)


@pytest.fixture
def row(backend, tmp_path):
    """The file of a row that is longer than its sliding layers hold, and the logits behind it."""
    memory = backend.new_cache(max_tokens=1000)
    slot = memory.open()
    for past in range(0, 600, 200):
        backend.forward(Batch.of([TEXT[past : past + 200]], [past], [slot]), memory)
    save_row(memory, slot, TEXT, tmp_path / "row", MADE)
    assert [p.name for p in tmp_path.iterdir()] == ["row"]
    return tmp_path / "row", after(backend, memory, slot)


def after(backend, memory, slot, past=600):
    """Logits of two tokens behind the text, of one that then comes alone, and of one in a fork."""
    child, answers = memory.fork(slot, past - 9), []
    for some, at, where in (([7, 8], past, slot), ([9], past + 2, slot), ([3], past - 9, child)):
        logits = backend.forward(Batch.of([some], [at], [where]), memory)
        answers.append(backend.to_numpy(logits))
    return np.concatenate(answers)


def test_a_row_goes_on_from_its_file_to_the_bit(backend, row):
    path, expected = row
    memory = backend.new_cache(max_tokens=1300)
    slot, tokens = load_row(memory, path, MADE)
    assert tokens == TEXT
    np.testing.assert_array_equal(after(backend, memory, slot), expected)


def test_a_row_without_room_takes_none(cache, row):
    slot, _ = load_row(cache, row[0], MADE)
    with pytest.raises(CacheFull, match="row: 600 tokens asked, 100 left of 700"):
        load_row(cache, row[0], MADE)
    cache.reserve(slot, 700)
    assert len(cache.reserved) == 1


@pytest.mark.parametrize(
    "made, said",
    [
        (MADE | {"model": "abd"}, "with model 'abc', not 'abd'; keys and values are good for one"),
        (MADE | {"kv": "int8"}, "with kv None, not 'int8'"),
        ({"model": "abc"}, "with dtype 'float32', not None"),
    ],
)
def test_a_row_of_another_model_or_another_way_of_running_it_is_refused(cache, row, made, said):
    with pytest.raises(CheckpointError, match=said):
        load_row(cache, row[0], made)
    assert not cache.reserved


def test_a_damaged_file_is_refused(cache, row, tmp_path):
    path, _ = row
    arrays = {name: tensor.array() for name, tensor in safetensors.read(path).items()}
    made, tokens = arrays.pop("made"), arrays.pop("tokens")
    first, last = min(arrays), max(arrays)
    for change, damaged in {
        "lost": {n: x for n, x in arrays.items() if n != last},
        "more": arrays | {"9.9": arrays[first]},
        "short": arrays | {first: arrays[first][..., :-1]},
        "kind": arrays | {first: arrays[first].view(np.int8)},
    }.items():
        write(tmp_path / change, damaged | {"made": made, "tokens": tokens})
        with pytest.raises(CheckpointError, match=f"{change}: its keys and values are damaged: "):
            load_row(cache, tmp_path / change, MADE)
    write(tmp_path / "longer", arrays | {"made": made, "tokens": np.append(tokens, tokens[:100])})
    with pytest.raises(CheckpointError, match="longer: its keys and values are damaged"):
        load_row(cache, tmp_path / "longer", MADE)
    write(tmp_path / "nobody", arrays | {"tokens": tokens})
    with pytest.raises(CheckpointError, match="not a row of keys and values"):
        load_row(cache, tmp_path / "nobody", MADE)
    for nonsense in (b"{", b"[" * 60_000, b"3", json.dumps(MADE).encode().ljust(1 << 17)):
        write(tmp_path / "odd", {"made": np.frombuffer(nonsense, np.uint8), "tokens": tokens})
        with pytest.raises(CheckpointError, match="odd: does not say what made it"):
            load_row(cache, tmp_path / "odd", MADE)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"damaged\. If it was a prompt.s cache"):
        load_row(cache, path, MADE)
    assert not cache.reserved


def test_what_a_file_holds_beyond_the_window_is_known_or_dropped(cache, row, tmp_path):
    """Not what ``save_row`` writes: a sliding layer with all that the row has seen."""
    arrays = {name: tensor.array() for name, tensor in safetensors.read(row[0]).items()}
    if not hasattr(cache, "strips") or arrays["1.0"].ndim != 4:
        pytest.skip("a row here is no strips, or strips of pages")
    whole = {name: arrays[f"1.{name[2:]}"] for name in arrays if name.startswith("0.")}
    write(tmp_path / "whole", arrays | whole)
    slot, _ = load_row(cache, tmp_path / "whole", MADE)
    strip, held = cache.strips[slot][0], cache.dump(slot)["0.0"]
    assert strip.first == 600 - held.shape[2]
    np.testing.assert_array_equal(held, whole["0.0"][:, :, strip.first :])


def test_what_cannot_be_written_leaves_what_was_there(backend, row, tmp_path):
    path, _ = row
    memory = backend.new_cache(max_tokens=1000)
    slot, tokens = load_row(memory, path, MADE)
    with pytest.raises(GptOssError, match="nowhere/row: cannot be written: No such file"):
        save_row(memory, slot, tokens, tmp_path / "nowhere" / "row", MADE)
    (tmp_path / "folder").mkdir()
    with pytest.raises(GptOssError, match="folder: cannot be written: Is a directory"):
        save_row(memory, slot, tokens, tmp_path / "folder", MADE)
    with pytest.raises(GptOssError, match="row/below: cannot be written: Not a directory"):
        save_row(memory, slot, tokens, path / "below", MADE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "row"]


def write(path, arrays):
    with path.open("wb") as file:
        rows._write(file, arrays)
