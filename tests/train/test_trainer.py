"""The loop: it learns, goes on exactly, and loses nothing when something is wrong."""

import pytest

torch = pytest.importorskip("torch")

import io  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import replace  # noqa: E402

from gptoss.checkpoint import staged  # noqa: E402
from gptoss.errors import CheckpointError, TrainingError  # noqa: E402
from gptoss.train import folder  # noqa: E402
from gptoss.train.batch import collate  # noqa: E402
from gptoss.train.loss import cross_entropy  # noqa: E402
from gptoss.train.show import curves  # noqa: E402
from tests.train.runs import CONFIG, documents, draw, losses, train, trainer  # noqa: E402


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    rows, model = train(path)
    return path, rows, model


def test_training_learns_and_reports(whole):
    path, rows, _ = whole
    assert [row["step"] for row in rows] == list(range(1, CONFIG.steps + 1))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["seen"] == sum(row["tokens"] for row in rows)
    assert {"norm", "rate", "busiest", "idle", "uneven", "memory"} <= set(rows[0])
    assert (path / "curves.png").stat().st_size > 1000


def test_the_same_run_gives_the_same_bits(whole, tmp_path):
    rows, model = train(tmp_path / "again")
    assert losses(rows) == losses(whole[1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[2].state_dict()[name]), name


@pytest.mark.parametrize("stop", [0, 3, 4, 11])
def test_an_interrupted_run_goes_on_to_the_bit(whole, tmp_path, stop):
    def interrupted(position):
        if position == 2 * stop or (stop == 0 and position is None):
            torch.rand(5)  # what was drawn of a step that never came is drawn again
            raise KeyboardInterrupt
        return draw(position)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, draw=interrupted)
    rows, model = train(tmp_path)
    assert losses(rows) == losses(whole[1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[2].state_dict()[name]), name


def test_only_the_newest_checkpoints_and_milestones_stay(tmp_path):
    half = tmp_path / "states/.00000001.gone"  # as a run leaves it that is killed while it prunes
    half.mkdir(parents=True)
    (half / "state.pt").write_bytes(b"half")
    train(tmp_path, replace(CONFIG, milestone=6, save_every=2, keep=1, steps=10))
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["00000006", "00000010"]


def test_accumulated_batches_are_one_batch(tmp_path, weights):
    """However the documents of a step are divided, the gradient is the same."""
    run = trainer(tmp_path)
    rows = list(documents(0, 6))
    found = []
    for groups in ([rows], [rows[:1], rows[1:4], rows[4:]]):
        run.model.zero_grad()
        for batch in collate(groups):
            cross_entropy(run.model, batch, replace(CONFIG, balance=0.0))[0].backward()
        found.append([p.grad.clone() for p in run.model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_two_runs_in_one_directory_are_refused(tmp_path):
    first = trainer(tmp_path)
    with pytest.raises(TrainingError, match="another run is training in this directory"):
        trainer(tmp_path)
    first.close()
    trainer(tmp_path).close()


def test_going_on_with_something_else_is_refused(whole):
    with pytest.raises(TrainingError, match=r"begun with lr 0\.01, not 0\.02"):
        trainer(whole[0], replace(CONFIG, lr=0.02))
    trainer(whole[0], replace(CONFIG, keep=5)).close()


def test_a_run_that_an_older_version_began_goes_on_without_what_is_new(tmp_path):
    train(tmp_path, replace(CONFIG, steps=3))
    trainer(tmp_path, replace(CONFIG, steps=3), asked={"added": False}).close()
    with pytest.raises(TrainingError, match="begun with more None, not True"):
        trainer(tmp_path, replace(CONFIG, steps=3), asked={"added": False, "more": True})


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    def poisoned(run):
        def loss(batch):
            value, found = cross_entropy(run.model, batch, CONFIG)
            return value * (torch.nan if "row 9" in batch.origin else 1.0), found

        return loss

    run = trainer(tmp_path)
    with pytest.raises(
        TrainingError, match="the loss of step 5 is nan, in the batch of row 9; "
    ) as e:
        run.run(draw, poisoned(run))
    assert "the checkpoint of step 3 is kept" in str(e.value)
    assert [p.name for p in (tmp_path / "states").iterdir()] == ["00000003"]
    assert len(train(tmp_path)[0]) == CONFIG.steps


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(whole, tmp_path, monkeypatch):
    def full(file):
        if "00000006" in str(file):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(staged, "sync", full)
    with pytest.raises(CheckpointError, match="the disk is full.* goes on from step 3 once") as e:
        train(tmp_path)
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "states").iterdir()] == ["00000003"]
    assert losses(train(tmp_path)[0]) == losses(whole[1])


@pytest.fixture
def full():
    """A disk on which no file may grow beyond a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_run_writes_beside_checkpoints_finds_no_room(tmp_path, full, caplog):
    """A picture is not worth the run; without its metrics it ends, and says where."""
    curves([{"step": 1, "loss": 2.0}], tmp_path / "curves.png")
    assert "curves.png is not drawn: File too large" in caplog.text
    with pytest.raises(CheckpointError, match="config.json: cannot be written: File too large"):
        trainer(tmp_path / "run")
    assert sorted(p.name for p in tmp_path.glob("**/*") if p.is_file()) == ["lock"]


def test_what_the_system_says_of_a_failed_write_is_heard():
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 10_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left on device"):
        folder.write({"a": torch.zeros(100_000)}, Full())


def test_a_checkpoint_that_cannot_be_read_is_named(whole, tmp_path):
    train(tmp_path)
    newest = tmp_path / "states" / "00000012" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="00000012: cannot be read .* remove it"):
        trainer(tmp_path)
    shutil.rmtree(newest.parent)
    again = trainer(tmp_path)  # nobody holds the directory
    assert again.step == 9
    again.close()


def killed(path, steps, moments):
    """Kill the process at each of the moments (seconds after its first line of metrics)."""
    command = [sys.executable, "-m", "tests.train.runs", str(path), str(steps)]
    metrics = path / "metrics.jsonl"
    for moment in moments:
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process = subprocess.Popen(command)
        while process.poll() is None and not (
            metrics.exists() and metrics.stat().st_mtime_ns > before
        ):
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True)
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize("steps, moments", [(40, 1), pytest.param(400, 20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_bit(tmp_path, steps, moments):
    rng = random.Random(steps)
    seconds = [rng.uniform(0.0, 0.6) for _ in range(moments)]
    rows = killed(tmp_path / "killed", steps, seconds)
    assert losses(rows) == losses(train(tmp_path / "whole", replace(CONFIG, steps=steps))[0])
