"""Commands as people start them: in processes of their own, or in this one where that will do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptoss
from gptoss import LLM
from gptoss.cli.main import main
from tests.llm.toy import play, without_specials, write_toy

COMMAND = [sys.executable, "-W", "error", "-m", "gptoss.cli"]
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("GPTOSS_", "HF_"))},
    "PYTHONPATH": str(Path(gptoss.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TERM": "dumb",
}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small random checkpoint."""
    return str(write_toy(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """One that never stops talking at temperature 0."""
    return str(without_specials(write_toy(tmp_path_factory.mktemp("endless"))))


def start(*args, **options):
    """A command that runs; pipes where nothing else is said."""
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = ENVIRONMENT | options.pop("env", {})
    return subprocess.Popen([*COMMAND, *map(str, args)], env=env, **given | options)


def run(*args, stdin=b"", **options):
    """A command that has run: its status and what it wrote."""
    process = start(*args, stdin=subprocess.PIPE, **options)
    out, err = process.communicate(stdin, timeout=100)
    assert b"Traceback" not in err, err.decode()
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def gptoss_(monkeypatch, capsys):
    """``gptoss_("generate", ...)`` in this process: status, stdout, stderr."""

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["gptoss", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        seen = capsys.readouterr()
        return end.value.code or 0, seen.out, seen.err

    return command


@pytest.fixture
def saying(monkeypatch):
    """Whatever is loaded says the given text, one for each turn."""
    load = LLM.load.__func__

    def say(*texts):
        left = list(texts)

        def scripted(cls, *args, **options):
            llm = load(cls, *args, **options)
            chat = llm.chat

            def next_turn(*a, **k):
                play(llm, left.pop(0))
                return chat(*a, **k)

            llm.chat = next_turn
            return llm

        monkeypatch.setattr(LLM, "load", classmethod(scripted))

    return say
