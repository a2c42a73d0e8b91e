import json
import re

import pytest

from gptoss.errors import BackendUnavailable
from tests.cli.conftest import start
from tests.llm.toy import toy_tokenizer


def tokens_of(page):
    return int(re.search(r"<title>\w+: (\d+) tokens</title>", page.read_text())[1])


def test_the_model_answers_and_the_page_is_written(gptoss_, tmp_path):
    page = tmp_path / "a.html"
    status, out, err = gptoss_("look", "What is 2 + 3?", "-t", "0", "--effort", "low", "-o", page)
    assert status == 0 and out.splitlines() == ["2 + 3 = 5", str(page)]
    assert "[analysis]" in err and tokens_of(page) > 80
    assert [*tmp_path.iterdir()] == [page]


def test_a_text_is_looked_at_as_it_is(gptoss_, toy, tmp_path):
    page = tmp_path / "a.html"
    status, out, _ = gptoss_("look", "<|start|>user<|message|>Hi", toy, "--text", "-o", page)
    assert (status, out) == (0, f"{page}\n") and tokens_of(page) == 8


def test_a_conversation_that_has_its_answer_is_looked_at_thoughts_included(gptoss_, toy, tmp_path):
    page, file = tmp_path / "a.html", tmp_path / "turns.json"
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "channel": "analysis", "content": "Two and two."},
        {"role": "assistant", "content": "Four."},
    ]
    counts = []
    for some in (turns, turns[:1] + turns[2:]):
        file.write_text(json.dumps(some))
        status, out, _ = gptoss_("look", toy, "--conversation", file, "-q", "-o", page)
        assert (status, out) == (0, f"{page}\n")
        counts.append(tokens_of(page))
    thought = "<|start|>assistant<|channel|>analysis<|message|>Two and two.<|end|>"
    assert counts[0] - counts[1] == len(toy_tokenizer().encode_with_specials(thought))


def test_a_conversation_that_waits_is_answered(gptoss_, toy, tmp_path):
    page, file = tmp_path / "a.html", tmp_path / "turns.json"
    file.write_text('[{"role": "user", "content": "2+2?"}]')
    ask = ("look", toy, "--conversation", file, "-q", "-o", page, "--seed", 1, "-l")
    assert gptoss_(*ask, 3)[0] == 0
    few = tokens_of(page)
    assert gptoss_(*ask, 8)[0] == 0
    assert tokens_of(page) == few + 5


def test_plots_are_written_where_asked(gptoss_, toy, tmp_path):
    pytest.importorskip("matplotlib")
    ask = ("look", "Hi there", toy, "--text", "-o", tmp_path / "a.html", "--png", tmp_path / "p")
    status, out, _ = gptoss_(*ask)
    assert status == 0 and len(out.splitlines()) == 5
    assert len([*(tmp_path / "p").glob("*.png")]) == 4


@pytest.mark.parametrize(
    "typed, said",
    [
        ([], "give PROMPT"),
        ([""], "give PROMPT"),
        (["hi", "nano", "more"], "one word too many"),
        (["hi", "--text", "--conversation", "x.json"], "--text reads PROMPT"),
        (["hi", "-t", "-1"], "temperature"),
        (["hi", "other", "--conversation", "x.json"], "in PROMPT's place: leave out 'hi'"),
    ],
)
def test_a_wrong_command_line_is_status_2_and_says_what(gptoss_, typed, said):
    status, out, err = gptoss_("look", *typed)
    assert (status, out) == (2, "") and said in err


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "list of messages"),
        ("{}", "list of messages"),
        ("[", "Expecting value"),
        ('[{"role": "king", "content": "x"}]', "king"),
        ('["hi"]', "expected a dict"),
        ("\xff", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_conversation_that_is_none_is_said_before_loading(gptoss_, tmp_path, content, said):
    file = tmp_path / "turns.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    status, out, err = gptoss_("look", "--conversation", file)
    assert (status, out) == (1, "") and said in err and str(file) in err
    assert len(err.splitlines()) == 1


def test_what_cannot_be_written_is_said_before_loading(gptoss_, toy, tmp_path, monkeypatch):
    for out in (tmp_path / "none" / "a.html", tmp_path):
        status, _, err = gptoss_("look", "hi", toy, "-o", out)
        assert status == 1 and err.startswith(f"gptoss: {out}: cannot be written;")
        assert len(err.splitlines()) == 1

    (tmp_path / "plots").touch()
    status, _, err = gptoss_("look", "hi", toy, "-o", tmp_path / "a", "--png", tmp_path / "plots")
    assert status == 1 and "is no directory" in err
    (tmp_path / "plots").unlink()

    def missing():
        raise BackendUnavailable("plots need matplotlib")

    monkeypatch.setattr("gptoss.sight.plots.need_matplotlib", missing)
    status, _, err = gptoss_("look", "hi", toy, "-o", tmp_path / "a.html", "--png", tmp_path)
    assert (status, err) == (1, "gptoss: plots need matplotlib\n")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_a_model_of_20b_widths_is_looked_at(tmp_path):
    """3.3 GB on disk, 4 GB of memory; the page has as much of two layers as there is room for."""
    model, page = tmp_path / "model", tmp_path / "a.html"
    made = start("synthesize", "20b", model, "--layers", 2)
    made.communicate()  # closes its pipes
    assert made.returncode == 0
    said = "The quick brown fox jumps over the lazy dog. " * 50
    looking = start("look", said, model, "--text", "-q", "-o", page)
    out, err = looking.communicate()
    assert (looking.returncode, out.decode()) == (0, f"{page}\n"), err.decode()
    assert tokens_of(page) == 501 and page.stat().st_size < 5_000_000
