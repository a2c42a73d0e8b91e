"""One file, all or nothing."""

import os
import threading

import pytest

from gptoss.checkpoint import staged
from gptoss.checkpoint.staged import staged_file
from gptoss.errors import GptOssError


def test_what_was_there_is_replaced_or_stays(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    with pytest.raises(ZeroDivisionError), staged_file(link) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert real.read_bytes() == b"old"
    with staged_file(link) as file:
        file.write(b"new")
    assert link.is_symlink() and real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_what_a_killed_process_left_is_removed_but_not_what_is_being_written(tmp_path):
    pytest.importorskip("fcntl")  # not on Windows, where nothing says who still writes
    left, live = tmp_path / ".target.partial-0", tmp_path / ".target.partial-1"
    for path in (left, live):
        path.write_bytes(b"half")
    with staged._locked(live) as mine, staged_file(tmp_path / "target") as file:
        file.write(b"whole")
        with staged_file(tmp_path / "other") as other:
            other.write(b"whole")
    assert mine and sorted(p.name for p in tmp_path.iterdir()) == [live.name, "other", "target"]


def test_a_full_disk_is_a_sentence(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    target = tmp_path / "target"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        cannot = pytest.raises(GptOssError, match="target: cannot be written: ")
        with cannot, staged_file(target) as file:
            file.write(bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old" and len([*tmp_path.iterdir()]) == 1


def test_a_pipe_is_written_to(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names")
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with staged_file(pipe) as file:
        file.write(b"through")
    reader.join(60)
    assert got == [b"through"] and pipe.is_fifo()
