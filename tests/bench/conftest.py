"""What the tests of measuring share."""

import sys

import pytest

from gptoss.bench import roofline
from gptoss.cli.main import main


@pytest.fixture
def bench(monkeypatch, capsys):
    """``gptoss bench ...`` in this process, with a brief roofline: status, stdout, stderr."""
    for name, value in (("BUFFER", 4 << 20), ("LARGEST", 4 << 20), ("PASSES", 1)):
        monkeypatch.setattr(roofline, name, value)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["gptoss", "bench", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        seen = capsys.readouterr()
        return end.value.code or 0, seen.out, seen.err

    return command
