"""Where there is no bubblewrap, no code is run, and it is said before anything else."""

import shutil

import pytest

from gptoss.errors import ToolUnavailable
from gptoss.tools import Toolbox, kit


def test_without_bubblewrap_the_tool_is_refused(monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda n, **k: None if n == "bwrap" else which(n, **k))
    with pytest.raises(ToolUnavailable, match="apt install bubblewrap"), Toolbox([kit("python")]):
        raise AssertionError("it was started")
