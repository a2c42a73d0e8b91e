"""A folder of documents, browsed as the model was trained to browse."""

import json

import pytest

from gptoss.errors import ToolUnavailable
from gptoss.tools import Toolbox, kit
from gptoss.tools.browser import VIEW


@pytest.fixture
def browse(talk, documents):
    conversation = talk(kit(f"browser={documents}"))

    def browse(name, fails=False, **arguments):
        talk = conversation.refused if fails else conversation
        return talk(f"browser.{name}", json.dumps(arguments))

    return browse


def test_a_search_shows_the_passage_and_opening_it_leads_there(browse):
    found = browse("search", query="tusk of the narwhal")
    assert found.startswith("[0] Search results: tusk of the narwhal\n**viewing lines [0 - ")
    assert "L0:   * 【0†Whales†whales.md】 The narwhal has one tusk of three metres." in found
    page = browse("open", id=0)
    assert page.startswith("[1] Whales (whales.md)\n**viewing lines [59 - 64] of 64**\n\nL59: ")
    assert "\nL63: The narwhal has one tusk of three metres.\nL64: It is a tooth." in page


def test_the_better_document_comes_first(browse):
    assert "【0†How large†size.html】" in browse("search", query="How large is it?")
    assert "【0†Whales†whales.md】" in browse("search", query="krill")


def test_pages_scroll_and_keep_their_cursor(browse):
    whole = browse("open", id="whales.md")
    assert len(whole) < VIEW + 200 and whole.startswith("[0] Whales (whales.md)")
    assert browse("open", loc=60, num_lines=2).splitlines()[0] == "[0] Whales (whales.md)"
    assert "**viewing lines [60 - 61] of 64**" in browse("open", loc=60, num_lines=2)
    assert browse("open", cursor=0.0, loc="3").splitlines()[3].startswith("L3: Line 0")


def test_links_lead_to_documents_and_to_nothing_else(browse):
    page = browse("open", id="whales.md", num_lines=4)
    assert "Blue whales are 【0†big】. They eat krill." in page
    size = browse("open", id=0)
    assert size.startswith("[1] How large (size.html)")
    assert "30 m long. 【0†More on whales】, and elsewhere." in size
    assert "alert" not in size and "p {}" not in size and "* one" in size
    assert browse("open", id=0).startswith("[2] Whales")
    assert browse("open", id=0, cursor=1).startswith("[3] Whales")
    assert "there is no link 1" in browse("open", id=1, fails=True)


def test_a_pattern_is_found(browse):
    browse("open", id="whales.md")
    found = browse("find", pattern="KRILL")
    assert "# 【0†match at L2】" in found and "Blue whales are big. They eat krill." in found
    assert "is not on the page" in browse("find", pattern="shark", cursor=0, fails=True)


def test_documents_cannot_forge_links(browse):
    assert "〖1‡fake〗" in browse("open", id="plain.txt")


@pytest.mark.parametrize(
    "address",
    ["/etc/passwd", "../secret.txt", "out.txt", "file:///etc/passwd", "http://127.0.0.1/", "a\0"],
)
def test_nothing_beside_the_folder_can_be_opened(talk, documents, address):
    (documents.parent / "secret.txt").write_text("hush zebra")
    (documents / "out.txt").symlink_to(documents.parent / "secret.txt")
    conversation = talk(kit(f"browser={documents}"))
    said = conversation.refused("browser.open", json.dumps({"id": address}))
    assert "none of the documents" in said
    assert "hush" not in conversation.result("browser.search", '{"query": "zebra"}').text


@pytest.mark.parametrize(
    "name, arguments, told",
    [
        ("open", "{}", "no page is open"),
        ("find", '{"pattern": "x"}', "no page is open"),
        ("search", "{}", "query must be a text"),
        ("search", "[]", "no JSON object"),
        ("search", '{"query": "', "no JSON object"),
        ("search", "[" * 9999, "no JSON object"),
        ("search", '{"query": "?!"}', "no words"),
        ("search", '{"query": "xylophone"}', "nothing was found"),
        ("search", '{"query": "a", "topn": "many"}', "topn must be a number"),
        ("click", "{}", "browser.search, .open and .find do"),
    ],
)
def test_a_wrong_call_is_told(talk, documents, name, arguments, told):
    assert told in talk(kit(f"browser={documents}")).refused(f"browser.{name}", arguments)


@pytest.mark.parametrize("query", ['"', "NEAR(a b)", "text:krill OR *", "-krill", "a" * 5000])
def test_no_query_is_taken_for_syntax(talk, documents, query):
    talk(kit(f"browser={documents}")).result("browser.search", json.dumps({"query": query}))


def test_a_folder_without_documents_is_refused(tmp_path):
    for folder, told in ((tmp_path, "no documents"), (tmp_path / "nix", "no folder")):
        with pytest.raises(ToolUnavailable, match=told), Toolbox([kit(f"browser={folder}")]):
            raise AssertionError("it was started")
