import json
import re
import signal

import pytest

from gptoss import LLM
from gptoss.cli.options import size
from tests.cli.conftest import run, start
from tests.llm.conftest import needs_native
from tests.llm.toy import SPECIALS, damaged, toy_tokenizer, write_toy

ANSWER = (
    "<|channel|>analysis<|message|>Two and two.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Four, é.<|return|>"
)


def test_the_answer_is_on_stdout_and_everything_else_on_stderr(gptoss_, saying, toy):
    saying(ANSWER)
    status, out, err = gptoss_("generate", toy, "-p", "2+2?", "-t", "0")
    assert (status, out) == (0, "Four, é.\n")
    assert "[analysis] Two and two.\n" in err
    assert "huggingface layout" in err and "memory:" in err


def test_quiet_says_nothing_about_loading(gptoss_, saying, toy):
    saying(ANSWER)
    assert gptoss_("generate", toy, "-p", "2+2?", "-t", "0", "-q")[2] == "[analysis] Two and two.\n"


def test_json_is_one_document(gptoss_, saying, toy):
    saying(ANSWER)
    status, out, err = gptoss_("generate", toy, "-p", "2+2?", "-t", "0", "-q", "--json")
    reply = json.loads(out)
    assert (status, err) == (0, "")
    assert (reply["text"], reply["analysis"]) == ("Four, é.", "Two and two.")
    assert reply["finish_reason"] == "stop" and reply["seed"] >= 0


@pytest.mark.parametrize(
    "said, note",
    [("<|channel|>analysis<|message|>Hm.<|return|>", "no final answer"), (ANSWER, "cut off")],
)
def test_an_odd_ending_is_said(gptoss_, saying, toy, said, note):
    saying(said)
    limit = len(toy_tokenizer().encode_with_specials(said)) - 4
    assert note in gptoss_("generate", toy, "-p", "?", "-t", "0", "-l", limit)[2]


def test_a_seed_gives_the_same_answer_and_another_another(gptoss_, toy):
    ask = ("generate", toy, "-p", "hi", "-q", "--raw", "-l", "20", "--seed")
    assert gptoss_(*ask, "1") == gptoss_(*ask, "1") != gptoss_(*ask, "2")


def test_logprobs_give_a_line_for_each_token(gptoss_, toy):
    ask = ("generate", toy, "-p", "<|start|>hi", "-q", "-l", "5", "--seed", "4")
    for raw in ((), ("--raw",)):
        status, out, _ = gptoss_(*ask, *raw, "--logprobs")
        rows = [line.split(maxsplit=2) for line in out.splitlines()]
        assert status == 0 and len(rows) == 5
        assert all(float(p) <= 0 and isinstance(json.loads(text), str) for _, p, text in rows)
        tokens = json.loads(gptoss_(*ask, *raw, "--logprobs", "--json")[1])["tokens"]
        assert [str(t["id"]) for t in tokens] == [r[0] for r in rows]


@pytest.mark.parametrize("how", [("-b", "reference"), ("-b", "mlx", "--kv", "int8")])
def test_a_prompt_that_was_kept_is_not_computed_again(gptoss_, tmp_path, how):
    if "mlx" in how:
        pytest.importorskip("mlx.core")
    file, prompt = tmp_path / "kept", "What rhymes with tree? " * 15  # longer than the window
    ask = ("generate", "nano", *how, "-t", "0", "-l", "3", "-p")
    plain, counts = gptoss_(*ask, prompt), []
    for text in (prompt, prompt, f"{prompt}Sea?"):
        status, out, err = gptoss_(*ask, text, "--prompt-cache", file)
        old, prompted, new = map(
            int, re.findall(r"kept: (\d+) of (\d+) tok.* (\d+) are now", err)[0]
        )
        assert status == 0 and new == prompted
        counts.append(prompted - old)
        if text == prompt:
            assert plain[1] == out and plain[2].splitlines()[2:] == err.splitlines()[2:-1]
    assert counts[0] > 128 and counts[1] == 1 and counts[2] < 20  # computed
    status, _, err = gptoss_("generate", "nano", "-b", "torch", "-p", "a", "--prompt-cache", file)
    assert status == 1 and f"kept: made with backend '{how[1]}', not 'torch'" in err
    file.write_bytes(file.read_bytes()[:-1])
    status, _, err = gptoss_(*ask, "a", "--prompt-cache", file)
    assert status == 1 and "incomplete or damaged" in err
    status, _, err = gptoss_(*ask, "a", "--prompt-cache", tmp_path / "nowhere" / "kept")
    assert status == 1 and "nowhere is no folder to write to" in err
    assert "no final answer" not in err, "said before anything is computed"


def test_raw_text_is_continued_from_stdin(toy):
    status, out, err = run("generate", toy, "--raw", "-q", "-l", 9, "--seed", 1, stdin=b"Once\n")
    assert (status, err) == (0, "")
    assert out == run("generate", toy, "--raw", "-q", "-l", 9, "--seed", 1, "-p", "Once")[1] != ""
    assert out == run("generate", toy, "--raw", "-ql9", "--seed", 1, "-p", "-", stdin=b"Once")[1]


def test_the_model_may_come_from_the_environment(toy):
    status, _, err = run("generate", "-p", "hi", "-l", 1, env={"GPTOSS_MODEL": toy})
    assert status == 0 and toy in err


@needs_native
@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_precision_threads_and_cache_are_in_the_plan(gptoss_, toy, kv):
    how = ("--precision", "exact", "--threads", 1, "--kv", kv)
    status, out, err = gptoss_("generate", toy, "-p", "hi", "-l", 3, "--raw", "--seed", 1, *how)
    assert status == 0 and "native backend in exact precision" in err
    assert "on cpu, 1 threads" in err and f" tokens in {kv} + " in err


@needs_native
def test_experts_stay_on_disk_within_a_given_memory(gptoss_, toy):
    needed = LLM.load(toy, "native").plan.needs
    ask = ("generate", toy, "-p", "hi", "-l", 9, "--raw", "--seed", 1, "-b", "native")
    status, out, err = gptoss_(*ask, "--memory", f"{needed.least / 1000:.3f}kB")
    assert status == 0 and "experts stay on disk" in err
    assert out == gptoss_(*ask)[1]


@pytest.mark.parametrize(
    "text, bytes", [("12GB", 12 * 10**9), ("1.5 gb", 15 * 10**8), ("800MB", 8 * 10**8), ("7", 7)]
)
def test_sizes_of_memory_as_people_write_them(text, bytes):
    assert size(text) == bytes


# --- what goes wrong


@pytest.mark.parametrize("extra", [(), ("--raw",), ("--logprobs",)])
def test_a_reader_that_leaves_ends_it_quietly(endless, extra):
    with start("generate", endless, "-p", "hi", "-q", "-t", "0", *extra) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(100) == 141
        assert b"Error" not in process.stderr.read()


def test_ctrl_c_ends_it_with_130_and_no_traceback(endless):
    process = start("generate", endless, "-p", "hi", "-q", "-t", "0", "--raw")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and b"Traceback" not in err


def test_closed_streams_are_no_accident(toy):
    import subprocess
    import sys

    from tests.cli.conftest import ENVIRONMENT

    line = f"exec {sys.executable} -m gptoss.cli generate {toy} -p hi --raw -l 4 <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], env=ENVIRONMENT, timeout=100).returncode == 0


def test_what_is_not_utf8_is_refused_in_a_sentence(toy):
    for answer in (
        run("generate", toy, stdin=b"caf\xe9"),
        run("generate", toy, "-p", b"caf\xe9".decode("utf-8", "surrogateescape")),
    ):
        status, out, err = answer
        assert (status, out) == (1, "") and "not UTF-8" in err and "byte 3 is 0xe9" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--effort", "max"], "effort"),
        (["-b", "tpu"], "tpu"),
        (["--dtype", "int4"], "int4"),
        (["-b", "reference", "--dtype", "bfloat16"], "bfloat16"),
        (["-b", "reference", "--precision", "fast"], "takes no precision"),
        (["-b", "native", "--dtype", "float32"], "takes no dtype"),
        (["-b", "torch", "--threads", "2"], "threads"),
        (["--precision", "finest"], "exact, fast"),
        (["--threads", "0"], "threads"),
        (["--memory", "12 apples"], "12GB"),
        (["--memory", "1kB"], "must be at least"),
        (["-b", "reference", "--memory", "12GB"], "keeps within a given memory"),
        (["-t", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--seed", "18446744073709551616"], "seed"),
        (["-l", "0"], "limit"),
        (["--context", "5000"], "2048"),
        (["-p", ""], "empty"),
    ],
)
def test_a_wrong_command_line_is_status_2_and_says_what(gptoss_, toy, wrong, said):
    status, out, err = gptoss_("generate", toy, "-p", "hi", *wrong)
    assert (status, out) == (2, "") and said in err.splitlines()[-1]


def sentence(answer):
    """The one line of an answer that failed, without the plan."""
    status, out, err = answer
    lines = [line for line in err.splitlines() if line.startswith("gptoss: ")]
    assert (status, out) == (1, "") and len(lines) == 1 and err.endswith(lines[0] + "\n")
    return lines[0]


def test_a_prompt_beyond_the_context_says_both_numbers(gptoss_, toy):
    said = sentence(gptoss_("generate", toy, "-q", "-p", "x" * 3000))
    assert "context of 2048" in said


def test_missing_empty_and_foreign_directories_are_said(gptoss_, tmp_path):
    assert "no such file" in sentence(gptoss_("generate", tmp_path / "none", "-p", "x"))
    assert str(tmp_path) in sentence(gptoss_("generate", tmp_path, "-p", "x"))
    path = write_toy(tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"model_type": "llama"}
    (path / "config.json").write_text(json.dumps(config))
    assert "'llama'" in sentence(gptoss_("generate", path, "-p", "x"))


def test_another_models_vocabulary_is_said(gptoss_, tmp_path):
    path = write_toy(tmp_path, tokenizer=toy_tokenizer(SPECIALS | {"<|far|>": 999}))
    assert "does not match the vocabulary" in sentence(gptoss_("generate", path, "-p", "x"))


def test_damaged_weights_are_said(gptoss_, tmp_path):
    path = damaged(write_toy(tmp_path))
    assert "NaN" in sentence(gptoss_("generate", path, "-p", "x"))
    assert "no finite weight" in sentence(gptoss_("inspect", path, "--check"))


def test_too_little_memory_is_said_before_loading(gptoss_, toy, monkeypatch):
    monkeypatch.setattr("gptoss.llm.plan.available_memory", lambda: 10)
    assert "10 B are free" in sentence(gptoss_("generate", toy, "-p", "x"))


def test_a_model_that_is_not_here_cannot_be_fetched_offline(tmp_path):
    answer = run("generate", "nobody/nothing", "-p", "x", env={"HF_HOME": str(tmp_path)})
    assert "nobody/nothing: cannot be downloaded" in sentence(answer)


class OutOfMemoryError(RuntimeError):
    """As torch has it."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_runs_out_is_said(gptoss_, toy, monkeypatch, error):
    def load(*args, **options):
        raise error

    monkeypatch.setattr("gptoss.cli.options.Loading.load", load)
    assert "no more memory" in sentence(gptoss_("generate", toy, "-p", "x"))
