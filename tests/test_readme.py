"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"^gptoss (.+?)(?:\s+#.*)?$", README, re.M)


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    expected = re.findall(r"print\(.*\)  # (.+)", block)
    assert expected, "a block without a stated result proves nothing"
    for line in expected:
        assert line in capsys.readouterr().out


def test_every_command_shown_exists():
    names = {line.split()[0] for line in COMMANDS}
    assert {"generate", "chat", "inspect", "convert", "synthesize", "models"} <= names
    for name in sorted(names):
        run = [sys.executable, "-m", "gptoss.cli", name, "--help"]
        assert subprocess.run(run, capture_output=True).returncode == 0, name


def test_every_path_shown_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
