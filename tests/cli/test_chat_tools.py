"""``gptoss chat --tool``: the model calls, the terminal shows, the model goes on."""

import pytest

CALL = "<|channel|>analysis to=browser.{} code<|message|>{}<|call|>"
FINAL = "<|channel|>final<|message|>{}<|return|>"


@pytest.fixture
def documents(tmp_path):
    (tmp_path / "a.md").write_text("# Whales\n\nThey eat krill.\n")
    return tmp_path


@pytest.fixture
def asks(monkeypatch):
    from gptoss.cli import chat

    def ask(*lines):
        left = [*lines, None]
        monkeypatch.setattr(chat, "ask", lambda screen: left.pop(0))

    return ask


def test_calls_are_run_and_shown(gptoss_, saying, asks, documents):
    saying(CALL.format("search", '{"query": "krill"}'), FINAL.format("Krill."))
    asks("What do they eat?")
    status, out, err = gptoss_("chat", "nano", "-q", "--tool", f"browser={documents}")
    assert (status, out) == (0, "Krill.\n")
    assert '[analysis to=browser.search] {"query": "krill"}' in err
    assert "[browser.search] [0] Search results: krill" in err and "They eat krill." in err


def test_a_failing_call_ends_nothing(gptoss_, saying, asks, documents):
    saying(CALL.format("open", "{}"), FINAL.format("Sorry."))
    asks("What do they eat?")
    _, out, err = gptoss_("chat", "nano", "-q", "--tool", f"browser={documents}")
    assert out == "Sorry.\n" and "no page is open yet; search first" in err


@pytest.mark.parametrize(
    "more, status, told",
    [
        (["--tool", "perl"], 2, "'perl' is none of python, python=INTERPRETER"),
        (["--tool", "browser=/nix"], 1, "there is no folder /nix"),
        (["--mcp", "x"], 2, "NAME=COMMAND or NAME=URL"),
    ],
)
def test_a_slip_is_told_before_a_model_is_loaded(gptoss_, more, status, told):
    ended, _, err = gptoss_("chat", "/nonexistent/model", *more)
    assert ended == status and told in err
