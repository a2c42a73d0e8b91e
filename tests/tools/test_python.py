"""Code in the sandbox: what it may do, and what it tries in vain."""

import os
import socket
import sys
from pathlib import Path

import pytest

from gptoss.errors import ToolUnavailable
from gptoss.tools.python import MOST_TEXT, Python
from gptoss.tools.sandbox import Limits, Sandbox
from tests.server.conftest import until
from tests.tools.conftest import call, needs_bwrap, sandboxes

pytestmark = needs_bwrap
BRIEF = Limits(seconds=1.0)


@pytest.fixture
def python(talk):
    conversation = talk(Python(Sandbox()))
    return lambda code: conversation("python", code)


@pytest.fixture
def brief(talk):
    return talk(Python(Sandbox(limits=BRIEF)))


def test_it_is_a_notebook(python):
    assert python("x = 6\nx * 7") == "42\n"
    assert python("print('a'); x") == "a\n6\n"
    assert python("_ + 1; None") == "(no output)"
    assert python("def f():\n    return x\n\nf()") == "6\n"
    fault = python("1 + 1\nx / 0")
    assert fault.startswith("Traceback") and "x / 0" in fault and "ZeroDivisionError" in fault
    assert "kernel" not in fault and fault.count("File") == 1
    assert python("raise SystemExit(3)") == "SystemExit: 3\n" and python("x") == "6\n"
    assert "SyntaxError" in python("1 +")


def test_files_stay_in_a_conversation_and_go_with_it(talk):
    kit = Python(Sandbox())
    first = talk(kit)
    write = "import os\nopen('/mnt/data/a.py', 'w').write('b = 5'); import a; a.b, os.getcwd()"
    assert first("python", write) == "(5, '/mnt/data')\n"
    assert first("python", "import tempfile; tempfile.TemporaryFile().write(b'x')") == "1\n"
    other = first.box.open(["python"])
    listed = other.run(call("python", "import os; os.listdir('/mnt/data')"), 800).result()
    assert "a.py" not in listed.text


def test_there_is_no_network_not_even_loopback(python):
    with socket.create_server(("127.0.0.1", 0)) as here:
        port = here.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # it listens
        said = python(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
    assert "refused" in said or "unreachable" in said
    assert "Error" in python("socket.create_connection(('192.0.2.1', 80), 2)")
    assert python("import os; os.listdir('/sys') if os.path.exists('/sys') else 0") == "0\n"


def test_other_folders_processes_and_secrets_are_not_to_be_seen(python, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hush")
    (tmp_path / "secret").write_text("hush")
    for path in (tmp_path, Path.home(), Path(__file__), Path("/etc/passwd"), Path("/root")):
        assert python(f"import os; os.path.exists({str(path)!r})") == "False\n", path
    assert "hush" not in python("dict(os.environ)")
    mine = python("[p for p in os.listdir('/proc') if p.isdigit()]")
    assert str(os.getpid()) not in mine and len(mine.split(",")) <= 3
    assert python("os.getuid(), os.getgid()") == "(65534, 65534)\n"


@pytest.mark.parametrize("path", ["/", "/usr", "/usr/bin", "/dev", "/mnt", "/proc/sys/kernel"])
def test_nothing_but_the_scratch_folder_can_be_written(python, path):
    said = python(f"open({path!r} + '/core_pattern', 'w').write('x')")
    assert "OSError" in said or "PermissionError" in said


@pytest.mark.parametrize(
    "code",
    [
        "bytearray(2 << 30)",
        "import mmap; mmap.mmap(-1, 2 << 30)",
        "import os; os.memfd_create('x')",
        "open('/mnt/data/x', 'wb').write(bytes(100 << 20))",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
        "import os; os.unshare(0x10000000)"
        if sys.version_info >= (3, 12)
        else "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
        "if c.unshare(0x10000000): raise OSError(ctypes.get_errno(), 'unshare')",
    ],
)
def test_more_than_its_share_is_refused(python, code):
    said = python(code)
    assert any(e in said for e in ("MemoryError", "OSError", "ValueError", "AttributeError")), said
    assert python("6 * 7") == "42\n", "and the interpreter goes on"


def test_memory_of_all_processes_counts_together(talk):
    hog = (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        b = bytearray(os.urandom(1 << 20) * 200)\n"
        "        time.sleep(100)\n"
        "time.sleep(100)"
    )
    said = talk(Python(Sandbox())).refused("python", hog)
    assert "took more than 1024 MiB of memory" in said and "are gone" in said
    until(lambda: not sandboxes())


def test_a_fork_bomb_is_over_with_its_call(brief):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    brief.result("python", bomb)  # stopped in order, or ended: it may be too busy to hear
    count = "import os; len([p for p in os.listdir('/proc') if p.isdigit()])"
    assert int(brief("python", count)) <= 3


def test_what_code_started_ends_with_the_call(python):
    start = "import subprocess; p = subprocess.Popen(['sleep', '1000']); p.poll()"
    assert python(start) == "(no output)"
    assert python("import os; len([p for p in os.listdir('/proc') if p.isdigit()])") == "2\n"


def test_an_endless_loop_is_stopped_and_names_stay(brief):
    assert brief("python", "x = 1") == "(no output)"
    assert "the time of this call is over" in brief("python", "while True: pass")
    assert brief("python", "x") == "1\n"


def test_code_that_does_not_hear_is_ended(brief):
    deaf = "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass"
    assert "did not stop after 1 seconds" in brief.refused("python", deaf)
    assert "NameError" in brief("python", "signal")


def test_endless_output_is_cut(talk):
    conversation = talk(Python(Sandbox(limits=Limits(output=1 << 20))))
    said = conversation.refused("python", "while True: print('x' * 1000)")
    assert "printed more than 1 MiB" in said and len(said) < MOST_TEXT + 500
    said = conversation("python", "print('a' * 50_000 + 'end')")
    assert len(said) < MOST_TEXT + 100 and "characters left out" in said and said.endswith("end\n")


@pytest.mark.parametrize("code", ["import os; os._exit(1)", "import os; os.kill(1, 9); os.abort()"])
def test_an_interpreter_that_dies_is_replaced(brief, code):
    assert "ended by itself" in brief.refused("python", code)
    assert brief("python", "1") == "1\n"


def test_a_fork_that_comes_back_does_not_answer(python):
    assert python("import os; _ = os.fork()") == "(no output)"
    assert python("2") == "2\n" and python("3") == "3\n"


def test_what_a_conversation_started_ends_with_it(talk):
    conversation = talk(Python(Sandbox()))
    conversation("python", "1")
    assert sandboxes()
    conversation.session.close()
    until(lambda: not sandboxes())


def test_a_call_that_is_cancelled_ends_the_code(talk):
    conversation = talk(Python(Sandbox()))
    running = conversation.session.run(call("python", "while True: pass"), 800)
    until(sandboxes)
    running.cancel()
    until(lambda: not sandboxes())
    assert conversation("python", "1") == "1\n"


def test_an_interpreter_that_is_none_is_refused_at_the_start(talk, tmp_path):
    for path in (tmp_path / "nix", Path("/bin/true")):
        with pytest.raises(ToolUnavailable, match="does not start here"):
            talk(Python(Sandbox(python=str(path))))
