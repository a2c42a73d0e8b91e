"""Who is asked to end keeps what he has, and goes on exactly."""

import pytest

torch = pytest.importorskip("torch")

import json  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import replace  # noqa: E402

from gptoss.train.learner import Torch  # noqa: E402
from gptoss.train.stop import Stopped  # noqa: E402
from tests.train.runs import CONFIG, draw, losses, train  # noqa: E402

LONG = replace(CONFIG, steps=1000)


def until(path, step):
    """The metrics of a long run that is interrupted before a step."""

    def interrupted(position):
        if position == 2 * step:
            raise KeyboardInterrupt
        return draw(position)

    with pytest.raises(KeyboardInterrupt):
        train(path, LONG, draw=interrupted)
    return losses(rows_of(path))


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_process_that_is_told_to_end_keeps_the_last_finished_step(tmp_path):
    path = tmp_path / "run"
    command = [sys.executable, "-m", "tests.train.runs", str(path), str(LONG.steps)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (
        (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").stat().st_size
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    last = len(rows_of(path))
    assert 0 < last < LONG.steps
    said = f"{path}: stopped by SIGTERM after step {last}; the same command goes on"
    assert err.splitlines()[-1].endswith(f"Stopped: {said}")
    assert (path / "states" / f"{last:08}").is_dir()
    assert until(path, last + 3) == until(tmp_path / "whole", last + 3)


def test_ctrl_c_in_the_middle_of_a_step_leaves_it_out(tmp_path):
    def interrupted(position):
        if position == 8:
            torch.rand(5)  # what was drawn of a step that never came is drawn again
            signal.raise_signal(signal.SIGINT)
        return draw(position)

    with pytest.raises(Stopped, match="stopped by SIGINT after step 4; the same") as stopped:
        train(tmp_path / "run", LONG, draw=interrupted)
    assert stopped.value.number == signal.SIGINT
    assert until(tmp_path / "run", 6) == until(tmp_path / "whole", 6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_parameters_change_waits_for_the_end_of_the_step(tmp_path, monkeypatch):
    update = Torch.update

    def signalled(self, share):
        signal.raise_signal(signal.SIGTERM)
        update(self, share)

    monkeypatch.setattr(Torch, "update", signalled)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 1;"):
        train(tmp_path / "run", LONG)
    monkeypatch.undo()
    assert until(tmp_path / "run", 3) == until(tmp_path / "whole", 3)


def test_a_second_signal_ends_at_once():
    lines = """
import signal, time
from gptoss.train.stop import Stop
with Stop().heard():
    for _ in range(2):  # one that came by two ways
        signal.raise_signal(signal.SIGTERM)
    print("still here", flush=True)
    time.sleep(1.2)
    signal.raise_signal(signal.SIGTERM)
    print("here too", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "still here\n")


def test_what_was_to_be_ignored_still_is():
    lines = """
import signal
from gptoss.train.stop import Stop
signal.signal(signal.SIGINT, signal.SIG_IGN)
stop = Stop()
with stop.heard(), stop.interruptible():
    signal.raise_signal(signal.SIGINT)
print(stop.number, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.stdout == "None True\n", done.stderr
