"""A file of many traces: parts make wholes, and what a killed process leaves harms nothing."""

import numpy as np
import pytest

from gptoss.errors import GptOssError
from gptoss.verify.trace import TraceFile, joined
from gptoss.verify.traces import MAGIC, Traces, Writer, is_traces, open_trace


def piece(*tokens, names=("embedding",), **about):
    n = len(tokens)
    arrays = {"tokens": np.array(tokens), "sketch": np.ones((n, len(names), 5), np.float32)}
    return TraceFile({"points": [*names], **about}, arrays)


def test_parts_are_joined_and_what_comes_again_replaces_what_was():
    def part(start, *tokens):
        return start, {"tokens": np.array(tokens)}

    assert joined([part(0, 1, 2), part(2, 3)])["tokens"].tolist() == [1, 2, 3]
    assert joined([part(0, 1, 2, 3), part(1, 7)])["tokens"].tolist() == [1, 7]
    assert joined([part(0, 1), part(1, 2), part(2, 3), part(0, 9)])["tokens"].tolist() == [9]
    assert joined([part(5, 1), part(6, 2)])["tokens"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="tokens 1 to 2 are missing"):
        joined([part(0, 1), part(2, 2)])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "many"
    writer = Writer(path)
    writer.add(piece(1, 2, prompt=3), key="x", id="req", past=0)
    writer.add(piece(9), key="y", id="other", past=0)
    writer.add(piece(3, 4, prompt=3), key="x", id="req", past=2)
    writer.add(piece(5, prompt=3), key="z", id="req", past=3, after=("x", 3))
    writer.close()
    return path


def test_traces_are_called_by_their_ids(path):
    traces = Traces(path)
    assert traces.names == ["req", "other", "req.1"]
    assert traces.load("req").tokens == [1, 2, 3, 4]
    assert traces.load("req.1").tokens == [1, 2, 3, 5]  # it goes on from the first's third token
    assert traces.size("req") == (4, 3) and traces.size("other") == (1, None)
    assert open_trace(f"{path}#other").tokens == [9]
    with pytest.raises(GptOssError, match="holds no trace 'one', only req, other, req.1"):
        traces.load("one")
    with pytest.raises(GptOssError, match="holds 3 traces; say .*#ID, of req, other"):
        open_trace(str(path))


def test_a_torn_end_is_cut_off_by_who_writes_next(path):
    whole = path.read_bytes()
    for lost in range(1, 200, 7):
        path.write_bytes(whole[:-lost])
        assert Traces(path).names == ["req", "other"]
        assert Traces(path).load("req").tokens == [1, 2, 3, 4]
    writer = Writer(path)
    writer.add(piece(7), key="new", id="new")
    writer.close()
    assert Traces(path).names == ["req", "other", "new"]
    assert open_trace(f"{path}#new").tokens == [7]
    assert writer.size == path.stat().st_size
    assert path.stat().st_mode & 0o77 == 0  # its owner's alone


def test_another_kind_of_file_is_left_alone(tmp_path):
    letter = tmp_path / "letter"
    letter.write_text("Dear reader")
    with pytest.raises(GptOssError, match="no file of traces"):
        Writer(letter)
    assert letter.read_text() == "Dear reader"
    with pytest.raises(GptOssError, match="is no trace"):
        open_trace(str(letter))
    piece(1).save(tmp_path / "one.npz")
    assert open_trace(str(tmp_path / "one.npz")).tokens == [1]
    with pytest.raises(GptOssError, match="holds one trace alone"):
        open_trace(f"{tmp_path / 'one.npz'}#req")
    (tmp_path / "empty").touch()
    Writer(tmp_path / "empty").close()
    assert is_traces(tmp_path / "empty") and Traces(tmp_path / "empty").names == []


def test_one_process_writes_at_a_time(path):
    pytest.importorskip("fcntl")  # not on Windows
    before = path.read_bytes()
    first = Writer(path)
    with pytest.raises(GptOssError, match="another process is writing"):
        Writer(path)
    first.close()
    Writer(path).close()
    assert path.read_bytes() == before


def test_a_missing_part_is_said(tmp_path):
    writer = Writer(tmp_path / "gap")
    writer.add(piece(1), key="x", id="x", past=4)
    writer.add(piece(1), key="x", id="x", past=6)
    writer.add(piece(1), key="y", id="y", past=4, after=("z", 4))
    writer.close()
    with pytest.raises(GptOssError, match="tokens 5 to 6 are missing"):
        open_trace(f"{tmp_path / 'gap'}#x")
    with pytest.raises(GptOssError, match="is not whole"):
        open_trace(f"{tmp_path / 'gap'}#y")
    for head in (b"{no}", b"[12]", b'{"key": "x"}'):
        (tmp_path / "bad").write_bytes(MAGIC + bytes([len(head), *bytes(11)]) + head)
        with pytest.raises(GptOssError, match="damaged at byte 28"):
            Traces(tmp_path / "bad")


def test_a_name_of_a_name_hides_nothing_and_any_path_will_do(tmp_path):
    path = tmp_path / "a#b"
    writer = Writer(path)
    for i, id in enumerate(("x", "x", "x.1", "x#y", "x")):
        writer.add(piece(i), key=str(i), id=id)
    writer.close()
    assert Traces(path).names == ["x", "x.1", "x.1.1", "x#y", "x.2"]
    assert open_trace(f"{path}#x.1.1").tokens == [2]
    assert open_trace(f"{path}#x#y").tokens == [3]


@pytest.mark.parametrize("kind", ["one", "many"])
def test_whatever_is_damaged_is_said(tmp_path, kind):
    path, draw = tmp_path / kind, np.random.default_rng(1)
    if kind == "one":
        piece(1, 2).save(path)
    else:
        writer = Writer(path)
        writer.add(piece(1, 2), key="x", id="x")
        writer.close()
    whole, said = path.read_bytes(), 0
    for _ in range(400):
        wrong = bytearray(whole)
        wrong[draw.integers(len(wrong))] = draw.integers(256)
        path.write_bytes(wrong)
        try:
            open_trace(str(path))
        except GptOssError:
            said += 1
    assert said > 100


def test_a_full_disk_leaves_what_was_there(path):
    resource = pytest.importorskip("resource")  # not on Windows
    whole, writer = path.read_bytes(), Writer(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, hard))
    try:
        with pytest.raises(OSError, match="large"):
            writer.add(piece(7), key="new", id="new")
        writer.close()  # which has nothing more to write
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
