import io
import os
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptoss.cli import chat
from gptoss.cli.terminal import Screen
from gptoss.llm import llm
from gptoss.text.parser import Delta
from tests.cli.conftest import COMMAND, ENVIRONMENT, run

FINAL = "<|channel|>final<|message|>{}<|return|>"


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """What a pipe brings."""

    files = []

    def write(text):
        path = tmp_path / "typed"
        path.write_text(text)
        files.append(path.open())
        monkeypatch.setattr(sys, "stdin", files[-1])

    yield write
    for file in files:
        file.close()


def test_a_pipe_brings_a_message_a_line_and_takes_plain_answers(gptoss_, saying, typed, toy):
    saying(FINAL.format("One."), FINAL.format("Two."))
    typed("first\n\nsecond\n")
    status, out, err = gptoss_("chat", toy, "-q", "-t", "0")
    assert (status, out, err) == (0, "One.\nTwo.\n", "")


def test_slash_commands(gptoss_, saying, typed, toy, monkeypatch):
    asked, real = [], llm.conversation

    def conversation(messages, **how):
        asked.append(([m.content for m in messages], how["effort"]))
        return real(messages, **how)

    monkeypatch.setattr(llm, "conversation", conversation)
    saying(*(FINAL.format(n) for n in "abcd"))
    typed("one\n/effort high\ntwo\n/reset\nthree\n/effort none\n/nonsense\n  //four\n/quit\nfive\n")
    status, out, err = gptoss_("chat", toy, "-q", "-t", "0")
    assert (status, out) == (0, "a\nb\nc\nd\n")
    assert [e for _, e in asked] == ["medium", "high", "high", "high"]
    assert [c[-1] for c, _ in asked] == ["one", "two", "three", "/four"]
    assert [len(c) for c, _ in asked] == [1, 3, 1, 3]
    assert err.count("/effort low|medium|high") == 2


def test_instructions_are_the_developers(gptoss_, saying, typed, toy, monkeypatch):
    seen = []
    from gptoss.text import harmony

    render = harmony.render_for_completion
    monkeypatch.setattr(
        harmony, "render_for_completion", lambda m, t: seen.extend(m) or render(m, t)
    )
    saying(FINAL.format("oui"))
    typed("yes?\n")
    gptoss_("chat", toy, "-q", "-t", "0", "--instructions", "French.")
    assert [m.role for m in seen] == ["system", "developer", "user"]
    assert seen[1].content.instructions == "French."


def test_a_turn_without_an_answer_is_taken_back(gptoss_, saying, typed, toy, monkeypatch):
    saying("<|channel|>analysis<|message|>Hm.<|return|>", FINAL.format("Yes."))
    typed("one\ntwo\n")
    status, out, err = gptoss_("chat", toy, "-q", "-t", "0")
    assert (status, out) == (0, "Yes.\n")
    assert "[analysis] Hm.\n(no final answer; the question is taken back)" in err


def test_a_conversation_that_outgrows_the_context_goes_on_after_reset(
    gptoss_, saying, typed, toy, monkeypatch
):
    saying(FINAL.format("a"), FINAL.format("b"))
    typed("")
    lines = iter(["x" * 3000, "/reset", "short", None])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(chat, "ask", lambda screen: next(lines))
    status, out, err = gptoss_("chat", toy, "-q", "-t", "0")
    assert (status, out) == (0, "b\n") and "context of 2048" in err and "/reset" in err


def test_from_a_pipe_a_message_beyond_the_context_is_a_failure(gptoss_, saying, typed, toy):
    saying(FINAL.format("a"), FINAL.format("b"))
    typed("x" * 3000 + "\nshort\n")
    status, out, err = gptoss_("chat", toy, "-q", "-t", "0")
    assert (status, out) == (1, "") and "context of 2048" in err


def test_an_answer_with_an_odd_header_does_not_end_the_conversation(gptoss_, saying, typed, toy):
    odd = (
        "<|channel|>analysis to=a..b text/plain<|message|>x<|end|><|start|>tool<|message|>y<|end|>"
    )
    odd += "<|start|>assistant<|channel|>final <|constrain|>text/plain<|message|>One.<|return|>"
    saying(odd, FINAL.format("Two."))
    typed("first\nsecond\n")
    status, out, err = gptoss_("chat", toy, "-q", "-t", "0")
    assert (status, out) == (0, "One.\nTwo.\n") and "[tool] y\n" in err


@pytest.mark.parametrize("command", ["chat", "generate"])
@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--top-p", "0"], "top_p"),
        (["--seed", str(2**64)], "seed"),
        (["-t", "nan"], "temperature"),
    ],
)
def test_a_slip_in_how_to_draw_is_said_before_a_model_is_sought(gptoss_, command, wrong, said):
    status, out, err = gptoss_(command, "no such model", *wrong)
    assert (status, out) == (2, "") and said in err.splitlines()[-1]


def test_what_is_not_utf8_ends_it_in_a_sentence(toy):
    status, _, err = run("chat", toy, "-q", "-l", 4, stdin=b"ok\n\xff\n")
    assert status == 1 and "gptoss: stdin: not UTF-8" in err


def test_instructions_that_are_not_utf8_are_refused_in_a_sentence(toy):
    instructions = b"caf\xe9".decode("utf-8", "surrogateescape")
    status, _, err = run("chat", toy, "-q", "--instructions", instructions)
    assert status == 1 and "gptoss: --instructions: not UTF-8" in err


def test_the_end_of_input_is_a_good_end(toy):
    assert run("chat", toy, "-q") == (0, "", "")


class Terminal:
    """A command that prompts, on a terminal of its own; stdout may be a file."""

    def __init__(self, *args, out=None):
        pty = pytest.importorskip("pty", reason="this system has no terminals of its own making")
        self.master, slave = pty.openpty()
        line = shlex.join([*COMMAND, *args])
        to = out or os.ttyname(slave)
        self.process = subprocess.Popen(
            # Whoever leads a session gets the first terminal it opens, and its Ctrl-C.
            ["sh", "-c", f"exec {line} <{os.ttyname(slave)} >{to} 2>{os.ttyname(slave)}"],
            start_new_session=True,
            env=ENVIRONMENT,
        )
        self.seen = ""
        self.expect("> ")
        os.close(slave)  # not before the command has opened it: a terminal needs somebody

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, text, seconds=60):
        """Wait until ``text`` has appeared after what was expected before."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen[-300:]!r}"
            try:
                piece = os.read(self.master, 4096)
            except OSError:
                piece = b""
            assert piece, f"{text!r} did not come before the end: {self.seen[-300:]!r}"
            self.seen += piece.decode(errors="replace")
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def interrupt(self, effect, after=None):
        """Ctrl-C, once the answer (or the prompt's line editor) is under way."""
        if after is not None:
            self.expect(after)
            while not self.seen.strip():
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        else:
            self.settle()
        self.type("\x03")
        if effect is not None:
            self.expect(effect)

    def settle(self):
        """Until it waits for keys: a signal in the moment before that, it notices with the next."""
        stat, used, still = Path(f"/proc/{self.process.pid}/stat"), None, 0
        if not stat.exists():
            return time.sleep(1)
        while still < 10 and self.process.poll() is None:
            time.sleep(0.05)
            fields = stat.read_text().rpartition(")")[2].split()
            before, used = used, fields[11:13]  # ticks of the processor
            still = still + 1 if fields[0] == "S" and used == before else 0

    def end(self):
        status = self.process.wait(60)
        os.close(self.master)
        return status


def test_ctrl_c_stops_the_turn_and_twice_at_the_prompt_leaves(endless):
    terminal = Terminal("chat", endless, "-t", "0", "-q")
    terminal.type("hello\n")
    terminal.interrupt("(stopped)", after="hello\r\n")
    terminal.expect("> ")
    terminal.interrupt("Ctrl-C again")
    terminal.expect("> ")
    terminal.interrupt(None)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.seen


def test_after_a_stopped_turn_the_conversation_goes_on(endless):
    terminal = Terminal("chat", endless, "-t", "0", "-q", "-l", "600")
    terminal.type("hello\n")
    terminal.interrupt("(stopped)", after="hello\r\n")
    terminal.expect("> ")
    terminal.type("again\n")
    terminal.expect("(cut off)")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_control_characters_of_a_model_do_not_reach_the_terminal(endless):
    from gptoss.cli.terminal import shown

    class Tty:
        def isatty(self):
            return True

    assert shown("a\x1b[2Jb\n\tc\x9b", Tty()) == "a\ufffd[2Jb\n\tc\ufffd"


def test_a_file_of_answers_has_no_prompts(toy, tmp_path):
    terminal = Terminal("chat", toy, "-q", "-l", "4", out=tmp_path / "answers")
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert (tmp_path / "answers").read_bytes() == b""


def test_thoughts_reach_the_terminal_as_they_are(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Tty())
    screen = Screen()
    screen.show(Delta(0, "user", None, None, "a :key: [b]"))
    screen.end()
    assert "[user] " in sys.stderr.getvalue() and "a :key: [b]" in sys.stderr.getvalue()
