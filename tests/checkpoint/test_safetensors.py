"""The reader of one file: equal to the official library on good files, one sentence on bad ones."""

import json
import logging
import os
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors

from gptoss.checkpoint.safetensors import DTYPES, LARGEST_HEADER, read
from gptoss.errors import CheckpointError
from tests.checkpoint.by_hand import described, glued, save

GOOD = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
    "c": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "empty": np.zeros((0, 7), np.float16),
    "scalar": np.array(3.0, np.float32),
}


def test_arrays_are_equal_to_what_was_written(tmp_path: Path) -> None:
    tensors = read(save(tmp_path / "x.safetensors", GOOD))
    assert list(tensors) == list(GOOD)
    for name, x in GOOD.items():
        assert (tensors[name].shape, tensors[name].nbytes) == (x.shape, x.nbytes)
        assert tensors[name].array().dtype == x.dtype
        np.testing.assert_array_equal(tensors[name].array(), x)


def test_the_official_library_agrees(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.safetensors"
    theirs = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(5, 2).bfloat16(),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "float": torch.randn(2, 2, 2),
        "small": torch.randn(4).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 3),
    }
    from safetensors.torch import save_file

    save_file(theirs, path, metadata={"format": "pt"})
    ours = read(path)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(ours)
        for name in file.keys():  # noqa: SIM118
            assert ours[name].dtype == file.get_slice(name).get_dtype()
            expected = file.get_tensor(name).float().numpy()
            np.testing.assert_array_equal(ours[name].array().astype(np.float32), expected)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_has_the_officials_width(tmp_path: Path, dtype: str) -> None:
    width = np.dtype(DTYPES[dtype]).itemsize
    path = tmp_path / "x.safetensors"
    path.write_bytes(glued({"t": entry(dtype, [3], [0, 3 * width])}, bytes(3 * width)))
    assert read(path)["t"].array().shape == (3,)
    with safetensors.safe_open(path, "np") as file:
        assert file.get_slice("t").get_shape() == [3]


def test_an_array_is_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", GOOD)
    view = read(path)["a"].array()
    assert not view.flags.writeable and not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    with path.open("r+b") as file:  # the file's new bytes show through: nothing was copied
        file.seek(path.stat().st_size - sum(x.nbytes for x in GOOD.values()))
        file.write(np.float32(42).tobytes())
    assert view[0, 0] == 42


def test_released_pages_come_back(tmp_path: Path) -> None:
    tensors = read(save(tmp_path / "x.safetensors", GOOD))
    view = tensors["a"].array()
    for tensor in tensors.values():
        tensor.release()
    np.testing.assert_array_equal(view, GOOD["a"])


def test_an_unaligned_tensor_is_copied_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"byte": np.zeros(1, np.uint8), "f": GOOD["a"], "h": GOOD["c"]}
    path = tmp_path / "x.safetensors"
    path.write_bytes(glued(*described(odd)))
    with caplog.at_level(logging.WARNING):
        tensors = read(path)
    assert "unaligned" in caplog.text and "'f', 'h'" in caplog.text
    for name in ("f", "h"):
        array = tensors[name].array()
        assert array.flags.aligned and not array.flags.writeable
        np.testing.assert_array_equal(array, odd[name])


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    save(tmp_path / "blob", GOOD)
    (tmp_path / "x.safetensors").symlink_to("blob")
    np.testing.assert_array_equal(read(tmp_path / "x.safetensors")["a"].array(), GOOD["a"])


def test_a_file_replaced_by_renaming_keeps_its_old_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", GOOD)
    tensors = read(path)
    save(tmp_path / "new", {"a": np.zeros(1, np.uint8)}).replace(path)
    np.testing.assert_array_equal(tensors["a"].array(), GOOD["a"])


def test_a_file_cut_off_after_opening_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", GOOD)
    tensors = read(path)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match=r"'c' ends at byte \d+.*shrunk to 100"):
        tensors["c"].array()


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOUR = bytes(4)
HUGE = "9" * 5000  # beyond the digits that Python turns into an int
DAMAGED = {
    "empty": (b"", "0 bytes are too few"),
    "seven bytes": (b"1234567", "7 bytes are too few"),
    "no header": (bytes(8), "not a JSON object"),
    "length beyond the file": (glued(b"{}", b"", 50), "header of 50 bytes, but 2 follow"),
    "absurd length": (glued(b"{}", b"", 2**64 - 1), "header of 18446744073709551615 bytes"),
    "truncated": (glued({"t": entry()}, b"123"), "needs 4 bytes.* of the 3 that follow"),
    "header cut": (glued(b'{"t": {', b""), "not valid JSON"),
    "not UTF-8": (glued(b'{"\xff": 1}', b""), "utf-8"),
    "UTF-16": (glued("{}".encode("utf-16"), b""), "not a JSON object"),
    "byte order mark": (glued(b"\xef\xbb\xbf{}", b""), "not a JSON object"),
    "not JSON": (glued(b"{tensor}", b""), "not valid JSON"),
    "two objects": (glued(b"{}{}", b""), "Extra data"),
    "deep lists": (glued(b'{"t": ' + b"[" * 10_000, b""), "nested too deeply"),
    "deep objects": (glued(b'{"t":' * 10_000, b""), "nested too deeply"),
    "lists without end": (glued(b'{"t": ' + b"[" * 200_000, b""), "200001 lists and objects in a"),
    "huge number": (glued(b'{"t": %s}' % HUGE.encode(), b""), "no number of a checkpoint"),
    "minus zero": (glued(b'{"t": -0}', b""), "no number of a checkpoint"),
    "NaN": (glued(b'{"t": NaN}', b""), "NaN is no number"),
    "infinity": (glued(b'{"t": -Infinity}', b""), "-Infinity is no number"),
    "a list": (glued(b"[1, 2]", b""), "not a JSON object"),
    "half a pair": (glued(rb'{"\ud800": 1}', b""), "surrogates"),
    "name twice": (glued(b'{"t": {}, "t": {}}', b""), "'t' stands twice"),
    "field twice": (glued(b'{"t": {"dtype": "U8", "dtype": "U8"}}', b""), "'dtype' stands twice"),
    "metadata twice": (glued(b'{"__metadata__":{"a":"","a":""}}', b""), "'a' stands twice"),
    "metadata of numbers": (glued({"__metadata__": {"a": 1}}, b""), "__metadata__ must map text"),
    "metadata a list": (glued({"__metadata__": []}, b""), "__metadata__ must map text"),
    "entry a number": (glued({"t": 3}, b""), "must have dtype, shape and data_offsets, not 3"),
    "entry null": (glued({"t": None}, b""), "must have dtype, shape"),
    "field missing": (glued({"t": {"dtype": "U8"}}, b""), "must have dtype, shape"),
    "field too many": (glued({"t": entry() | {"x": 1}}, FOUR), "must have dtype, shape"),
    "unknown dtype": (glued({"t": entry("F3")}, FOUR), "dtype 'F3'; known are BF16"),
    "dtype a list": (glued({"t": entry(["U8"])}, FOUR), r"dtype \['U8'\]"),
    "shape a number": (glued({"t": entry(shape=4)}, FOUR), "the shape 4"),
    "shape of floats": (glued({"t": entry(shape=[4.0])}, FOUR), r"the shape \[4.0\]"),
    "shape of truths": (glued({"t": entry(shape=[True])}, b"1"), r"the shape \[True\]"),
    "shape of text": (glued({"t": entry(shape=["4"])}, FOUR), r"the shape \['4'\]"),
    "negative size": (glued({"t": entry(shape=[-4])}, FOUR), r"the shape \[-4\]"),
    "two negatives": (glued({"t": entry(shape=[-2, -2])}, FOUR), r"the shape \[-2, -2\]"),
    "too many axes": (glued({"t": entry(shape=[1] * 33)}, b"1"), "no tensor can have"),
    "overflow": (glued({"t": entry(shape=[2**32, 2**32])}, FOUR), "larger than any memory"),
    "zeros and giants": (
        glued({"t": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b""),
        "larger than any memory",
    ),
    "offsets a number": (glued({"t": entry(offsets=4)}, FOUR), "data_offsets 4"),
    "three offsets": (glued({"t": entry(offsets=[0, 4, 4])}, FOUR), "data_offsets"),
    "offsets of floats": (glued({"t": entry(offsets=[0, 4.0])}, FOUR), "data_offsets"),
    "offset negative": (glued({"t": entry(offsets=[-4, 0])}, FOUR), "data_offsets"),
    "offsets reversed": (glued({"t": entry(offsets=[4, 0])}, FOUR), r"data_offsets \[4, 0\]"),
    "span too long": (glued({"t": entry(shape=[3])}, FOUR), "needs 3 bytes.*0 to 4 of the 4"),
    "out of the file": (glued({"t": entry(offsets=[1, 5])}, FOUR), "bytes 1 to 5 of the 4"),
    "hole in front": (
        glued({"t": entry(offsets=[1, 5])}, bytes(5)),
        "'t' begins at byte 1 and leaves a hole after 'the header'",
    ),
    "overlap": (
        glued({"t": entry(), "u": entry(offsets=[2, 6])}, bytes(6)),
        "'u' begins at byte 2 and overlaps 't', which ends at 4",
    ),
    "hole between": (
        glued({"t": entry(), "u": entry(offsets=[5, 9])}, bytes(9)),
        "'u' begins at byte 5 and leaves a hole after 't', which ends at 4",
    ),
    "same bytes twice": (glued({"t": entry(), "u": entry()}, FOUR), "overlaps"),
    "trailing bytes": (glued({"t": entry()}, bytes(9)), "end at byte 4, but 9 bytes follow"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(100), "GGUF file. Only safetensors"),
    "zip": (b"PK\3\4\x14\0\0\0\x08\x08" + bytes(100), "zip archive, as PyTorch saves"),
    "pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF" + bytes(100), "Python pickle"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "JSON": (b'{"weight_map": {}}', "JSON, not safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    raw, message = DAMAGED[damage]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and len(said) < 600 and "\n" not in said
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_header_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(glued(b"{}", b"", LARGEST_HEADER + 1))
    os.truncate(path, LARGEST_HEADER * 2)  # sparse: costs no disk
    with pytest.raises(CheckpointError, match=f"the limit is {LARGEST_HEADER}"):
        read(path)


@pytest.mark.parametrize("thing", [b"[]", b"{}", b'{"a":1}'])
def test_a_header_cannot_take_many_times_its_size_in_memory(tmp_path: Path, thing: bytes) -> None:
    path, size = tmp_path / "x.safetensors", 3_000_000
    path.write_bytes(glued(b'{"t":[' + thing + (b"," + thing) * (size // len(thing)) + b"]}", b""))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="lists and objects in a header of"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_a_header_of_many_small_tensors_is_read(tmp_path: Path) -> None:
    many = {
        f"{i:x}": {"dtype": "U8", "shape": [], "data_offsets": [i, i + 1]} for i in range(20_000)
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(glued(json.dumps(many, separators=(",", ":")).encode(), bytes(20_000)))
    assert len(read(path)) == 20_000


def test_empty_axes_of_any_length_are_fine_where_numpy_has_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(glued({"t": entry("BF16", [2**20, 0, 2**30], [0, 0])}, b""))
    assert read(path)["t"].array().shape == (2**20, 0, 2**30)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"hangs for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    cases = {
        tmp_path: "found a directory",
        tmp_path / "pipe": "found a pipe or a device",
        Path("/dev/zero"): "found a pipe or a device",
        tmp_path / "loop": "cannot be opened: Too many levels",
        tmp_path / "nowhere": "cannot be opened: No such file",
        tmp_path / "gone": "cannot be opened: No such file",
        tmp_path / "null\0byte": "cannot be opened: embedded null byte",
    }
    with at_most(seconds=5):
        for path, message in cases.items():
            with pytest.raises(CheckpointError, match=message):
                read(path)


def test_an_unreadable_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "x.safetensors", GOOD)
    monkeypatch.setattr(os, "open", denied)  # root may read anything, so permissions prove nothing
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        read(path)


def test_names_cannot_garble_a_message(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(glued({"\x1b[2J\n" + "x" * 10_000: 3}, b""))
    with pytest.raises(CheckpointError) as caught:
        read(path)
    said = str(caught.value)
    assert "\x1b" not in said and "\n" not in said and len(said) < 600
