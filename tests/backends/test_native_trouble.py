"""The native backend as people treat it: interrupted, forked, shared, damaged, moved."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

core = pytest.importorskip("gptoss._core", reason="gptoss was installed without a compiler")

from gptoss import LLM  # noqa: E402
from gptoss.backends import NARROW  # noqa: E402
from gptoss.backends.native import NativeBackend  # noqa: E402
from gptoss.checkpoint.open import open_checkpoint  # noqa: E402
from gptoss.checkpoint.synthesize import reader, synthesize  # noqa: E402
from gptoss.engine import Engine, Request  # noqa: E402
from gptoss.errors import GptOssError  # noqa: E402
from gptoss.model.mxfp4 import Packed  # noqa: E402
from gptoss.model.weights import specs  # noqa: E402
from tests.cli.conftest import ENVIRONMENT, run, start  # noqa: E402
from tests.llm.toy import CONFIG as TOY  # noqa: E402
from tests.llm.toy import write_toy  # noqa: E402

CONFIG = replace(TOY, hidden_size=NARROW)  # wide enough for fast to be another than exact
TEXT = [9 + i * 7 % 900 for i in range(700)]
QUESTION = "What is 247 + 385?"
PRECISIONS = ["exact", "fast"]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture(autouse=True)
def as_before():
    yield
    core.use_isa(core.isas()[0])
    core.set_threads(core.usable_cores())


def load(**options):
    return LLM.load("nano", "native", **{"threads": 2} | options)


def answer(llm):
    reply = llm.chat(QUESTION, temperature=0)
    return reply.analysis, reply.text


def python(script, *args):
    """What a program in a process of its own prints."""
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def assert_threads_sleep():
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1, "threads spin although no step runs"


# --- interrupted --------------------------------------------------------------------------------


def test_ctrl_c_in_a_long_prompt_ends_the_command(tmp_path):
    """With status 130, where the whole prompt and its one token would end with 0."""
    large = replace(
        CONFIG,
        num_hidden_layers=8,
        hidden_size=768,
        intermediate_size=768,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        initial_context_length=1024,
    )
    path = write_toy(tmp_path / "models", config=large)
    how = ("--context", 8000, "--threads", 2, "--precision", "exact")
    process = start("generate", path, "-p", "x" * 7500, "--raw", "-l", 1, *how)
    assert process.stderr.readline(), "the plan is said before anything is loaded"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err and b"leak" not in err


def test_a_signal_in_the_middle_of_a_step_leaves_the_model_right():
    def interrupt(*_):
        raise KeyboardInterrupt

    llm = load()
    truth = llm.logits(TEXT[:300])
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in np.linspace(0.001, 0.05, 10):
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, delay)
                while True:
                    llm.logits(TEXT)
            assert np.array_equal(llm.logits(TEXT[:300]), truth)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_threads_sleep()


def test_an_interrupt_at_any_line_leaves_the_model_right():
    """A step of a text that is half known already, broken off between any two lines."""
    llm = load()
    engine, half, whole = llm.tokens.engine, TEXT[:100], TEXT[:230]

    def answer():
        stream = engine.submit(Request(prompt=whole, max_tokens=1, logprobs=0))
        with stream:
            return list(stream), stream.reused

    def read(until=None):
        """The token after the text, unless broken off; and how many lines have run."""
        lines = count()

        def within(frame, event, _):
            if event == "line" and next(lines) == until:
                raise KeyboardInterrupt
            return within

        def follow(frame, event, _):
            path = frame.f_code.co_filename.replace(os.sep, "/")
            return within if "/backends/native/" in path or "/model/model.py" in path else None

        llm.logits(half)
        before = sys.gettrace()
        sys.settrace(follow)
        try:
            return answer(), next(lines)
        finally:
            sys.settrace(before)

    engine.clear()
    (truth, reused), total = read()
    assert reused == len(half) and total > 500
    for line in [*range(20), *range(20, total, total // 40)]:
        with pytest.raises(KeyboardInterrupt):
            read(line)
        assert answer()[0] == truth, f"after an interrupt at line {line} of {total}"
        engine.clear()
    assert_threads_sleep()


def test_an_interrupt_right_behind_the_beginning_of_a_step_ends_it(monkeypatch):
    llm, begin = load(), core.begin_step

    def interrupted():
        begin()
        raise KeyboardInterrupt

    monkeypatch.setattr(core, "begin_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.logits(TEXT)
    assert_threads_sleep()


# --- forked, shared -----------------------------------------------------------------------------

FORK = """
import os, signal, sys
from gptoss import LLM
llm, tokens = LLM.load("nano", "native", threads=2), [9 + i * 7 % 900 for i in range(700)]
if "used" in sys.argv:
    llm.logits(tokens)
child = os.fork()
if not child:
    signal.alarm(20)
print(hash(llm.logits(tokens).tobytes()), flush=True)
if child:
    assert os.waitpid(child, 0)[1] == 0, "the child hangs or fails"
"""
POOL = """
import multiprocessing, sys
from gptoss import LLM
llm, tokens = LLM.load("nano", "native", threads=2), [9 + i * 7 % 900 for i in range(700)]
def work(_):
    return hash(llm.logits(tokens).tobytes())
print(work(0))
with multiprocessing.get_context("fork").Pool(2) as pool:
    for number in pool.map_async(work, range(4)).get(30):
        print(number)
"""
LEAVE = """
import threading, time
from gptoss import LLM
llm = LLM.load("nano", "native", threads=2)
def work():
    while True:
        llm.logits([9 + i * 7 % 900 for i in range(700)])
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""


@forks
@pytest.mark.parametrize("when", ["used", "fresh"])
def test_a_fork_computes_the_same_numbers_and_ends(when):
    assert len(set(python(FORK, when).split())) == 1


@forks
def test_forked_workers_compute_the_same_numbers():
    numbers = python(POOL).split()
    assert len(numbers) == 5 and len(set(numbers)) == 1


def test_a_program_may_end_while_a_thread_still_computes():
    for _ in range(3):
        assert python(LEAVE) == ""


def test_two_threads_may_use_two_models():
    models = [load(), load()]
    truths = [model.logits(TEXT) for model in models]
    right = []

    def use(model, truth):
        for length in (700, 1, 130, 400, 2, 700):
            right.append(np.array_equal(model.logits(TEXT[:length]), truth[:length]))

    threads = [threading.Thread(target=use, args=pair) for pair in zip(models, truths, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 12, "a thread hangs, or computes something else"


def test_a_step_survives_that_another_ends():
    """The end of a thread's step sends all to sleep; the next operation of another wakes them."""
    llm, over = load(), threading.Event()
    truth = llm.logits(TEXT)

    def end():
        while not over.is_set():
            core.end_step()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    for _ in range(3):
        assert np.array_equal(llm.logits(TEXT), truth)
    over.set()
    thread.join()


# --- cores, threads, instruction sets -----------------------------------------------------------

ASK = f"""
import os, sys
cores, threads = map(int, sys.argv[1:])
if cores:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
from gptoss import LLM, _core
llm = LLM.load("nano", "native", threads=threads or None)
assert _core.threads() == (threads or _core.usable_cores())
assert not cores or _core.usable_cores() <= cores
reply = llm.chat({QUESTION!r}, temperature=0)
print((reply.analysis, reply.text))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken away here")
@pytest.mark.parametrize("cores, threads", [(1, 0), (1, 3), (0, 7)])
def test_any_number_of_cores_and_threads_says_the_same(cores, threads):
    assert python(ASK, cores, threads) == f"{answer(load(threads=1))}\n"


def test_threads_may_change_between_uses_and_within_one():
    llm = load(threads=1)
    truth = llm.logits(TEXT)
    for threads in (3, 1, 2):
        core.set_threads(threads)
        assert np.array_equal(llm.logits(TEXT), truth)
    whole = llm.generate("Who", temperature=0, max_tokens=12)
    pieces = []
    for threads, piece in enumerate(llm.generate("Who", temperature=0, max_tokens=12, stream=True)):
        core.set_threads(1 + threads % 3)
        pieces.append(piece)
    assert "".join(pieces) == whole


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_processor_without_vectors_says_the_same(precision, tmp_path):
    path, tokens = write_toy(tmp_path / "models", config=CONFIG), [t % 256 for t in TEXT[:100]]
    nano, wide = load(), LLM.load(path, "native", precision=precision)
    truth = answer(nano), wide.logits(tokens)
    core.use_isa("scalar")
    assert answer(nano) == truth[0]
    assert np.array_equal(wide.logits(tokens), truth[1])


@pytest.mark.parametrize(
    "wrong, what",
    [
        (("--precision", "half"), "half"),
        (("--threads", "0"), "--threads: 0"),
        (("--threads", "two"), "'two' is not a whole number"),
        (("--threads", "5000"), "threads must be"),
        (("--backend", "reference", "--threads", "2"), "reference"),
        (("--backend", "torch", "--precision", "fast"), "torch"),
    ],
)
def test_a_wrong_precision_or_number_of_threads_is_a_sentence(wrong, what):
    status, out, err = run("generate", "nano", "-q", "-p", "hi", "-l", "1", *wrong)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert what in err


# --- damaged, moved -----------------------------------------------------------------------------


def poisoned(name, stored):
    """The same tensor with one number in it that is none."""
    if isinstance(stored, Packed):
        scales = stored.scales.copy()
        scales[..., -1] = 255  # of every row's last block: some expert is always visited
        return Packed(stored.blocks, scales)
    stored = stored.copy()
    if name == "embedding.weight":
        stored[TEXT[3] % len(stored), 5] = np.nan
    else:
        stored.reshape(-1)[stored.size // 3] = np.nan
    return stored


@pytest.mark.parametrize("isa", [core.isas()[0], "scalar"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "name", [spec.name for spec in specs(replace(CONFIG, num_hidden_layers=1))]
)
def test_a_weight_that_is_no_number_is_an_error_and_no_garbage(name, precision, isa):
    core.use_isa(isa)
    sound = reader(CONFIG, 1)

    def read(other):
        return poisoned(name, sound(other)) if other == name else sound(other)

    engine = Engine(NativeBackend(CONFIG, read, precision))
    with pytest.raises(GptOssError, match="contains NaN"):
        list(engine.submit(Request(prompt=[t % 256 for t in TEXT[:40]], max_tokens=1)))


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.gate_up_proj_scales"],
)
def test_a_damaged_checkpoint_is_one_sentence(name, tmp_path):
    path = write_toy(tmp_path / "models", config=CONFIG)
    tensor = open_checkpoint(path).tensors[name]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff" * tensor.nbytes)
    for precision in PRECISIONS:
        how = ("--backend", "native", "--precision", precision)
        status, out, err = run("generate", path, "-q", "-p", "hi", "--raw", *how)
        assert (status, out, len(err.splitlines())) == (1, "", 1)
        assert "contains NaN" in err


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be replaced there")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_checkpoint_that_is_replaced_keeps_answering(precision, tmp_path):
    path = write_toy(tmp_path / "models", config=CONFIG)
    llm = LLM.load(path, "native", precision=precision)
    path.rename(tmp_path / "old")
    words = tmp_path / "old" / "tokenizer.json"
    synthesize(CONFIG, path, seed=9, tokenizer_path=words)
    tokens = [t % 256 for t in TEXT[:300]]
    truth = LLM.load(tmp_path / "old", "native", precision=precision).logits(tokens)
    shutil.rmtree(tmp_path / "old")
    assert np.array_equal(llm.logits(tokens), truth)
    other = LLM.load(path, "native", precision=precision).logits(tokens)
    assert not np.array_equal(other, truth), "this is another checkpoint"
