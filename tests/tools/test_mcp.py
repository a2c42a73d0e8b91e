"""Real MCP servers, over stdio and HTTP, that work, fail, hang and die."""

import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from gptoss.errors import ToolUnavailable
from gptoss.tools import Toolbox, mcp, mcp_server
from tests.server.conftest import until
from tests.tools.conftest import THINGS, Talk

HTTP = """
import sys
sys.path.insert(0, {folder!r})
from mcp_server import server
server.run("streamable-http", port={port})
"""


@pytest.fixture(scope="module")
def things():
    with Toolbox([mcp_server(f"things={THINGS}")]) as box:
        yield Talk(box)


def test_its_tools_are_functions(things):
    functions = {f.name: f for f in things.box.kits["things"].offer.functions}
    assert set(functions) == {"things_add", "things_fail", "things_die", "things_hang"}
    assert functions["things_add"].description == "Add two numbers."
    assert functions["things_add"].parameters["required"] == ["a", "b"]
    assert things("functions.things_add", '{"a": 2, "b": 3}') == "5"


def test_errors_are_told(things):
    assert "integer" in things.refused("functions.things_add", '{"a": "x", "b": 1}')
    assert "fail" in things.refused("functions.things_fail", "{}")
    assert "no JSON" in things.refused("functions.things_add", "{")
    assert things("functions.things_add", '{"a": 1, "b": 1}') == "2"


def test_a_server_that_dies_is_one_sentence_and_comes_back(things):
    said = things.refused("functions.things_die", "{}")
    assert said == "the MCP server things ended during the call"
    assert things("functions.things_add", '{"a": 1, "b": 2}') == "3"


def test_a_call_that_hangs_is_given_up(things, monkeypatch):
    monkeypatch.setattr(mcp, "CALL", 0.5)
    assert "took longer than" in things.refused("functions.things_hang", "{}")


@pytest.mark.parametrize("where", ["/nonexistent/server", "false", "http://127.0.0.1:9/mcp"])
def test_a_server_that_is_not_there_is_refused_at_the_start(where):
    with (
        pytest.raises(ToolUnavailable, match="the MCP server x cannot be reached"),
        Toolbox([mcp_server(f"x={where}")]),
    ):
        raise AssertionError("it was started")


@pytest.mark.parametrize("said", ["", "x", "x=", "=cat", "a b=cat", "python=cat", "../x=cat"])
def test_a_name_and_a_place_are_needed(said):
    with pytest.raises(ValueError, match="NAME=COMMAND or NAME=URL"):
        mcp_server(said)


def test_streamable_http(talk):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = HTTP.format(folder=str(Path(__file__).parent), port=port)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], **quiet) as server:
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/mcp"))
            conversation = talk(mcp_server(f"far=http://127.0.0.1:{port}/mcp"))
            assert conversation("functions.far_add", '{"a": 2, "b": 3}') == "5"
        finally:
            server.kill()


def answers(url):
    try:
        return httpx2.get(url).status_code > 0
    except httpx2.HTTPError:
        return False
