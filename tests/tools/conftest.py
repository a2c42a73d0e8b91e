"""Tools as a conversation has them, started for real."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss.text.messages import Message
from gptoss.tools import Toolbox
from gptoss.tools.sandbox import as_nobody

THINGS = f"{sys.executable} {Path(__file__).with_name('mcp_server.py')}"


def bwrap_starts():
    """Whether it is there and new enough, and the system lets it make a namespace."""
    if (found := shutil.which("bwrap")) is None:
        return False
    words = "--unshare-all --unshare-user --disable-userns --ro-bind / / /bin/sh -c true".split()
    ran = subprocess.run([found, *words], capture_output=True, timeout=60, **as_nobody())
    return ran.returncode == 0


needs_bwrap = pytest.mark.skipif(
    not bwrap_starts(), reason="bubblewrap does not start here, or is none: apt install bubblewrap"
)


def call(recipient, text, channel=None):
    channel = channel or ("commentary" if recipient.startswith("functions.") else "analysis")
    return Message(role="assistant", channel=channel, recipient=recipient, content=text)


def sandboxes():
    """Processes of bubblewrap below this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if name == "bwrap" and int(rest.split()[1]) == os.getpid() and rest.split()[0] != "Z":
            found.append(stat)
    return found


class Talk:
    """One conversation with some tools."""

    def __init__(self, box):
        self.box = box
        self.session = box.open(list(box.kits))

    def result(self, recipient, text):
        return self.session.run(call(recipient, text), 800).result()

    def __call__(self, recipient, text):
        result = self.result(recipient, text)
        assert not result.failed, result.text
        return result.text

    def refused(self, recipient, text):
        result = self.result(recipient, text)
        assert result.failed, result.text
        return result.text


@pytest.fixture
def talk():
    """``talk(kit, ...)``: a conversation in which they are switched on."""
    boxes = []

    def begin(*kits):
        boxes.append(Toolbox(kits).__enter__())
        return Talk(boxes[-1])

    yield begin
    for box in boxes:
        box.__exit__()


@pytest.fixture
def documents(tmp_path):
    """A folder to browse and to patch."""
    folder = tmp_path / "documents"
    folder.mkdir()
    whales = ["# Whales", "", "Blue whales are [big](size.html). They eat krill."]
    whales += [f"Line {i} says nothing." for i in range(60)]
    whales += ["The narwhal has one tusk of three metres.", "It is a tooth."]
    (folder / "whales.md").write_text("\n".join(whales) + "\n", encoding="utf-8")
    (folder / "size.html").write_text(
        "<html><head><title>How large</title><style>p {}</style></head><body><h1>Size</h1>"
        "<p>A blue whale is 30 m long. <a href='whales.md'>More on whales</a>, and "
        "<a href='https://example.com/'>elsewhere</a>.<script>alert(1)</script></p>"
        "<ul><li>one</li><li>two</li></ul></body></html>",
        encoding="utf-8",
    )
    (folder / "plain.txt").write_text("Nothing about the sea 【1†fake】 here.\n", encoding="utf-8")
    return folder
