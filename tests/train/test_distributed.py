"""Several processes train what one trains: the same numbers, and checkpoints for any number."""

import pytest

torch = pytest.importorskip("torch")

import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.errors import CheckpointError  # noqa: E402
from gptoss.train.batch import collate  # noqa: E402
from gptoss.train.config import Reading, TrainConfig  # noqa: E402
from gptoss.train.export import export  # noqa: E402
from gptoss.train.ranks import Ranks, join  # noqa: E402
from gptoss.train.recipes import sft  # noqa: E402
from tests.conftest import TINY  # noqa: E402
from tests.llm.toy import write_toy  # noqa: E402
from tests.train import coin, crowd  # noqa: E402
from tests.train.runs import documents  # noqa: E402

STEPS = {"steps": 4, "save_every": 2}
LONGER = {**STEPS, "steps": 8}
CASES = {  # of two processes
    "rows": {**STEPS},
    "tensor": {"tensor": 2, **STEPS},
    "expert": {"expert": 2, "recompute": True, **STEPS},
    "lora": {"kind": "lora", "expert": 2, **STEPS},
    "qat": {"kind": "qat", "batches": 1, **STEPS},
}
ELSE = {
    "onward": {"until": 6, "tensor": 2, **LONGER},
    "spoilt": {"spoil": "row 7", **STEPS},
    "full": {"room": 5000, **STEPS},
    "strict": {"recipe": "grpo", "strict": True, "save_every": 100},
    "three": {"tensor": 3},
    "offload": {"offload": "optimizer"},
}
MORE = {  # of four
    "rows": {**STEPS},
    "grid": {"tensor": 2, "expert": 2, **STEPS},
    "parts": {"batches": 1, "expert": 2, **STEPS},
    "onward": {"until": 6, "expert": 4, **LONGER},
}


def torchrun(processes, *command):
    """A command that starts so many processes of a module."""
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    return [*run, *map(str, command)]


def together(path, processes, cases):
    """Runs of so many processes, each in a directory of its name."""
    (path / "cases.json").write_text(json.dumps(cases))
    command = torchrun(processes, "tests.train.crowd", path, path / "cases.json")
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def alone(path, **how):
    """The same run, of one process."""
    crowd.run(path, **{**how, "tensor": 1, "expert": 1})
    return rows_of(path)


def assert_the_same(found, wanted):
    """But for the order in which numbers were added up."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        for name in ("loss", "norm", "tokens", "busiest", "idle", "uneven"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), (row["step"], name)


def lay_coin(path, parameters):
    """What recipes on rewards begin with, in a directory."""
    path.mkdir(exist_ok=True)
    torch.save(parameters, path / "coin.pt")
    coin.written(path / "prompts.jsonl")


@pytest.fixture(scope="module")
def two(tmp_path_factory, parameters):
    """What two processes did, and before them one that was interrupted."""
    path = tmp_path_factory.mktemp("two")
    lay_coin(path, parameters)
    with pytest.raises(KeyboardInterrupt):
        crowd.run(path / "onward", until=3, **LONGER)
    together(path, 2, CASES | ELSE | {"reward": {"recipe": "grpo", "steps": 2}})
    return path


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(two, tmp_path, case):
    assert not (two / f"{case}.error").exists()
    assert_the_same(rows_of(two / case), alone(tmp_path / case, **CASES[case]))


def assert_answered_alike(found, wanted):
    """The same answers, judged alike, and learned from alike."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        for name in ("reward", "length", "tokens"):
            assert row[name] == other[name], (row["step"], name)
        for name in ("loss", "norm", "entropy"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (row["step"], name)
        assert row["gap"] < 1e-5 and row["ratio"] < 1e-5


def test_two_processes_answer_and_learn_like_one(two, parameters, tmp_path):
    lay_coin(tmp_path, parameters)
    crowd.answer(tmp_path / "reward", "grpo", steps=2)
    assert_answered_alike(rows_of(two / "reward"), rows_of(tmp_path / "reward"))


def test_a_run_goes_on_with_another_number_of_processes(two, tmp_path):
    """Begun by one, continued by two, ended by one."""
    assert [row["step"] for row in rows_of(two / "onward")][-1] == 6
    found = alone(two / "onward", **LONGER)
    assert_the_same(found, alone(tmp_path / "whole", **LONGER))


def test_checkpoints_of_several_are_pruned_and_opened_like_those_of_one(two):
    states = two / "tensor" / "states"
    assert sorted(p.name for p in states.iterdir()) == ["00000002", "00000004"]
    for file in (states / "00000004").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="00000004: cannot be read"):
        crowd.run(two / "tensor", **STEPS)


def test_a_loss_that_is_no_number_is_said_of_its_batch_whoever_had_it(two):
    said = (two / "spoilt.error").read_text()
    assert (
        said.startswith("Diverged: ")
        and "the loss of step 4 is nan, in the batch of row 7;" in said
    )
    assert "the checkpoint of step 2 is kept" in said


def test_a_full_disk_is_one_sentence_whoever_met_it(two):
    said = (two / "full.error").read_text()
    assert "00000002: could not be written: File too large. Nothing was left behind." in said
    assert said.startswith("CheckpointError: ") and not list((two / "full" / "states").iterdir())


def test_a_reward_that_raises_anywhere_costs_no_step(two):
    said = (two / "strict.error").read_text()
    assert said.startswith("TrainingError: ") and "the reward patient raised KeyError" in said
    last = len(rows_of(two / "strict"))
    assert [p.name for p in (two / "strict" / "states").iterdir()] == [f"{last:08}"] and last


@pytest.mark.parametrize(
    "case, said",
    [
        ("three", "ValueError: tensor 3 and expert 1 take a multiple of 3 processes, not 2"),
        ("offload", "ValueError: offload is for one process"),
    ],
)
def test_what_does_not_fit_the_processes_is_refused(two, case, said):
    assert (two / f"{case}.error").read_text().startswith(said)


def test_what_does_not_fit_the_model_is_refused():
    from gptoss.train.divide import check

    model = Transformer(TINY)
    check(model, Ranks(size=4, tensor=2, expert=2))
    with pytest.raises(ValueError, match="tensor 4 does not divide the 2 key heads of this model"):
        check(model, Ranks(size=4, tensor=4))
    with pytest.raises(ValueError, match="expert 3 does not divide the 4 experts of this model"):
        check(model, Ranks(size=3, expert=3))
    with pytest.raises(ValueError, match="lora and tensor exclude each other"):
        check(crowd.model_of("lora"), Ranks(size=2, tensor=2))


def test_axes_without_torchrun_are_refused():
    with pytest.raises(ValueError, match="not 1: torchrun --nproc-per-node 2 -m gptoss"):
        join(TrainConfig(tensor=2))


def test_parts_of_a_batch_add_up_to_it():
    [batch] = collate([list(documents(0, 5))])
    for count in (1, 2, 3, 7):
        parts = [batch.part(i, count) for i in range(count)]
        real = [part for part in parts if part.share]
        assert torch.equal(torch.cat([part.tokens for part in real]), batch.tokens)
        assert torch.equal(torch.cat([part.targets for part in real]), batch.targets)
        assert sum((part.lengths for part in real), []) == batch.lengths
        assert sum(float(part.weights.sum()) for part in parts) == pytest.approx(1.0)
        assert sum(part.share for part in parts) == pytest.approx(1.0)
        for part in parts:
            assert len(part.tokens) == sum(part.lengths) > 0
            assert len(part.wanted) == len(part.targets) == len(part.weights)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    said = [("user", "{a}+{b}?"), ("assistant", "{c}")]
    lines = [
        {"messages": [{"role": r, "content": t.format(a=a, b=b, c=a + b)} for r, t in said]}
        for a in range(4)
        for b in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def children(pid):
    """Of a process: rank -> pid."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        ranks = [x.removeprefix("RANK=") for x in environment if x.startswith("RANK=")]
        found |= {int(rank): int(child) for rank in ranks}
    return found


@contextmanager
def started(command):
    """A ``torchrun`` that ends with the test, whatever happens, and with it whom it has started."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_one_killed_process_ends_the_others_and_the_run_goes_on(data, tmp_path):
    """In one sentence; and one process goes on, and exports."""
    model, run = write_toy(tmp_path), tmp_path / "run"
    words = (
        f"--steps 300 --lr 1e-2 --tokens 700 --accumulate 2 --save-every 2 --threads 1 --out {run}"
    )
    command = torchrun(2, "gptoss", "train", "sft", model, data, *words.split())
    with started(command) as process:
        while process.poll() is None and not (run / "states" / "00000002").exists():
            time.sleep(0.02)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        err = process.communicate()[1]
    said = [line for line in err.splitlines() if line.startswith("gptoss:")]
    kept = int(max((run / "states").iterdir()).name)
    assert said == [
        f"gptoss: {run}: a process of this run has ended; the checkpoint of step {kept} is kept. "
        "The same command goes on."
    ]
    assert process.returncode == 1
    config = TrainConfig(steps=300, lr=1e-2, save_every=2, threads=1)

    def stop(row):
        if row["step"] == kept + 1:
            raise KeyboardInterrupt

    reading = Reading(tokens=700, accumulate=2)
    with pytest.raises(KeyboardInterrupt):
        sft(model, [data], run, config=config, reading=reading, watch=stop)
    assert [row["step"] for row in rows_of(run)] == [*range(1, kept + 2)]
    assert export(run, tmp_path / "out").experts


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_killed_at_any_moment_two_go_on_as_if_nothing_had_been(data, tmp_path):
    """Also while a checkpoint is written: one is, after every step."""
    rng, model = random.Random(0), write_toy(tmp_path)
    words = f"{model} {data} --steps 60 --lr 1e-2 --tokens 700 --save-every 1 --threads 1 --out"
    command = torchrun(2, "gptoss", "train", "sft", *words.split())
    run = tmp_path / "killed"
    for _ in range(6):
        with started([*command, run]) as process:
            while process.poll() is None and len(children(process.pid)) < 2:
                time.sleep(0.02)
            steps = len(rows_of(run)) if (run / "metrics.jsonl").exists() else 0
            while process.poll() is None and not (run / "states" / f"{steps + 2:08}").exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.3))
            os.kill(children(process.pid)[rng.randrange(2)], signal.SIGKILL)
            err = process.communicate()[1]
        said = [line for line in err.splitlines() if "gptoss: " in line]
        assert len(said) == 1 and "a process of this run has ended; the checkpoint of" in said[0]
        for state in (run / "states").glob("0*"):
            assert {"state.pt", ".metadata"} < {file.name for file in state.iterdir()}
    subprocess.run([*command, run], check=True)
    subprocess.run([*command, tmp_path / "whole"], check=True)
    assert_the_same(rows_of(run), rows_of(tmp_path / "whole"))


@pytest.fixture(scope="module")
def four(tmp_path_factory, parameters):
    path = tmp_path_factory.mktemp("four")
    lay_coin(path, parameters)
    with pytest.raises(KeyboardInterrupt):
        crowd.run(path / "onward", until=2, **LONGER)
    together(path, 2, {"onward": {"until": 4, "expert": 2, **LONGER}})
    together(path, 4, MORE | {"reward": {"recipe": "ppo", "tensor": 2, "expert": 2}})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_four_processes_compute_what_one_does(four, tmp_path, case):
    how = {k: v for k, v in MORE[case].items() if k != "until"}
    found = alone(four / case, **how) if case == "onward" else rows_of(four / case)
    assert_the_same(found, alone(tmp_path / case, **how))


@pytest.mark.slow
def test_rows_that_three_cannot_divide_evenly(tmp_path):
    """32 rows make 11, 11 and 10; 4 sinks make 2, 2 and none."""
    together(tmp_path, 3, {"three": STEPS})
    assert_the_same(rows_of(tmp_path / "three"), alone(tmp_path / "one", **STEPS))


@pytest.mark.slow
def test_four_processes_answer_and_learn_like_one(four, parameters, tmp_path):
    lay_coin(tmp_path, parameters)
    crowd.answer(tmp_path / "reward", "ppo")
    assert_answered_alike(rows_of(four / "reward"), rows_of(tmp_path / "reward"))


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["", "--tensor 2", "--expert 2", "--tensor 2 --expert 2"])
def test_nano_is_trained_alike_by_four(data, tmp_path, axes):
    words = f"--steps 10 --lr 1e-3 --tokens 400 --balance 0.01 --threads 1 {axes}"
    arguments = ["gptoss", "train", "sft", "nano", data, *words.split(), "--out"]
    subprocess.run(torchrun(4, *arguments, tmp_path / "four"), check=True)
    config = TrainConfig(steps=10, lr=1e-3, balance=0.01, threads=1)
    sft("nano", [data], tmp_path / "one", config=config, reading=Reading(tokens=400))
    assert_the_same(rows_of(tmp_path / "four"), rows_of(tmp_path / "one"))
