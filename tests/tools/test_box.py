"""What the model is told of tools, and how long it may call them."""

import pytest

from gptoss.llm.llm import conversation
from gptoss.text import harmony
from gptoss.text.messages import Developer, Message, System, Tool
from gptoss.text.tokenizer import Tokenizer
from gptoss.tools import Toolbox, box, kit
from tests.tools.conftest import call


@pytest.fixture
def tools(documents):
    with Toolbox([kit(f"browser={documents}"), kit(f"apply_patch={documents}")]) as tools:
        yield tools


def test_tools_are_told_of_where_the_model_was_trained_to_look(tools):
    turns = tools.offered(conversation("hi", instructions="Be brief."), ["browser", "apply_patch"])
    system, developer = turns[0].content, turns[1].content
    assert isinstance(system, System) and system.builtin_tools == ("browser",)
    assert isinstance(developer, Developer) and [t.name for t in developer.tools] == ["apply_patch"]
    assert developer.instructions.startswith("Be brief.\n\n# apply_patch\n")
    tokenizer = Tokenizer.o200k_harmony()
    text = tokenizer.decode(harmony.render(turns, tokenizer))
    assert "namespace browser {" in text and "type apply_patch = (_: string) => any;" in text
    assert conversation("hi") == tools.offered(conversation("hi"), [])


def test_a_function_of_that_name_is_refused(tools):
    mine = conversation("hi", tools=[Tool(name="apply_patch")])
    with pytest.raises(ValueError, match="two have the name 'apply_patch'"):
        tools.offered(mine, ["apply_patch"])


def test_whose_calls_are_run(tools):
    session = tools.open(["browser"])
    owned = {r: session.owner(r) for r in ("browser.search", "browser", "python", "functions.x")}
    assert owned == {
        "browser.search": "browser",
        "browser": "browser",
        "python": None,
        "functions.x": None,
    }
    assert session.owner("functions.apply_patch") is None and session.owner(None) is None
    assert session.owner("browser.a b") is None, "no name of a tool can forge a header"
    assert tools.open(["apply_patch"]).owner("functions.apply_patch") == "apply_patch"


def test_rounds_end(tools):
    search = call("browser.search", '{"query": "krill"}')
    answer = Message(role="assistant", channel="final", content="Krill.")
    rounds = tools.open(["browser"]).rounds(most=1)
    assert rounds.next([answer]) is None and rounds.next([search, answer]) is None
    first = rounds.run(rounds.next([search])).result()
    assert not first.failed and first.message.channel == "analysis"
    assert (first.message.name, first.message.recipient) == ("browser.search", "assistant")
    assert rounds.over
    for _ in range(box.STUBBORN):
        told = rounds.run(rounds.next([search])).result()
        assert told.failed and "No more calls" in told.text
    assert rounds.next([search]) is None, "a model that only calls is stopped"


def test_time_is_of_a_whole_turn(tools, monkeypatch):
    monkeypatch.setattr(box, "MOST_SECONDS", 0.0)
    rounds = tools.open(["browser"]).rounds()
    assert rounds.over and "No more calls" in rounds.run(call("browser.search", "{}")).result().text


def test_a_fault_of_ours_is_told_and_logged(tools, monkeypatch, caplog):
    session = tools.open(["browser"])

    async def fault(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(session._opened["browser"], "call", fault)
    result = session.run(call("browser.search", "{}"), 10).result()
    assert result.failed and result.text == "The tool failed (RuntimeError)."
    assert "a bug" in caplog.text


@pytest.mark.parametrize("said", ["", "perl", "browser", "apply_patch=", "browser="])
def test_what_is_no_tool_is_refused(said):
    with pytest.raises(ValueError, match="is none of python"):
        kit(said)


def test_two_of_one_name_are_refused(documents):
    with pytest.raises(ValueError, match="two tools are called 'browser'"):
        Toolbox([kit(f"browser={documents}"), kit(f"browser={documents}")])
