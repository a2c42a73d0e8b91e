"""The page in a real browser, where there is one: `apt-get install chromium`."""

import re

import numpy as np
import pytest

from gptoss.sight.messages import spans
from gptoss.sight.page import page
from gptoss.text.tokenizer import Tokenizer
from tests.sight.browser import CHROMIUM, Browser
from tests.sight.cases import wide

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    tab = Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def path(nano, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "look.html"
    file.write_text(page(nano.sight, nano.tokenizer, "nano"), encoding="utf-8")
    return file


@pytest.fixture
def shown(browser, path):
    """The page, just opened."""
    browser.open(path)
    yield browser
    assert browser.complaints == []
    assert browser.asked == [path.as_uri()]  # itself, and nothing else


def text(browser, selector):
    return browser.js(f"document.querySelector({selector!r}).textContent")


def selected(browser):
    """Which token, by all three who should agree."""
    [one] = browser.js(
        "[...document.querySelectorAll('.token[aria-selected=true]')].map(e => +e.dataset.token)"
    )
    assert browser.js("tokens.getAttribute('aria-activedescendant')") == f"t{one}"
    assert text(browser, "#step-name").startswith(f"Token {one}: ")
    return one


def rows(browser, table):
    return browser.js(
        f"[...document.querySelectorAll('{table} tbody tr')]"
        ".map(r => [...r.cells].map(c => c.innerText.trim()))"
    )


def test_it_shows_every_token_and_the_last_answer(shown, nano):
    said = shown.js("[...document.querySelectorAll('.token')].map(e => e.textContent).join('')")
    assert said == nano.tokenizer.decode(nano.tokens).replace("\n", "↵\n")
    labels = shown.js("[...document.querySelectorAll('.message')].map(e => e.ariaLabel)")
    assert labels == "user analysis final user analysis final".split()
    assert nano.tokenizer.decode([nano.tokens[selected(shown)]]).startswith("e")


def test_a_click_shows_alternatives_lens_attention_and_experts(shown, nano):
    shown.click("#t100")
    assert selected(shown) == 100
    p, sight = 99, nano.sight
    first, *_ = alternatives = rows(shown, "#alternatives")
    best = nano.tokenizer.decode(sight.expected.likeliest[p, :1].tolist())
    assert len(alternatives) == 10 + (sight.expected.rank[p] > 10) and best.strip() in first[0]
    assert sum("it came" in row[2] for row in alternatives) == 1
    lens = rows(shown, "#lens")
    assert [row[3] for row in lens] == [str(layer.rank[p]) for layer in sight.lens]
    experts = rows(shown, "#experts")
    for row, chosen in zip(experts, sight.chosen[p], strict=True):
        assert [cell.split()[0] for cell in row[1:]] == [f"#{e}" for e in chosen]
    heads = rows(shown, "#attention")[1:]
    last = sight.attention[-1]
    assert len(heads) == 4
    for row, weight, where in zip(heads, last.weight[p], last.where[p], strict=True):
        assert f" at {where[0]}: " in row[2] and f"{round(100 * weight[0])}"[0] in row[2]


def test_the_side_chooses_between_the_step_before_and_its_own(shown):
    shown.click("#t100")
    before = text(shown, "#which")
    shown.click("input[value=reads]")
    assert "Step 99 " in before and "Step 100 " in text(shown, "#which")
    assert selected(shown) == 100


def test_the_first_and_the_last_token_have_less_to_show(shown, nano):
    shown.click("#t0")
    assert "given" in text(shown, "#which") and rows(shown, "#lens") == []
    shown.js("tokens.focus()")
    shown.press("End")
    shown.click("input[value=reads]")
    assert selected(shown) == len(nano.tokens) - 1
    assert not any(row[2] for row in rows(shown, "#alternatives"))


def test_keys_move_the_selection_by_token_line_message_and_to_the_ends(shown, nano):
    shown.click("#t20")
    for key, expected in [
        ("ArrowRight", 21),
        ("ArrowLeft", 20),
        ("Home", 0),
        ("ArrowLeft", 0),
        ("End", len(nano.tokens) - 1),
        ("ArrowRight", len(nano.tokens) - 1),
    ]:
        shown.press(key)
        assert selected(shown) == expected, key
    starts = shown.js("[...document.querySelectorAll('.who + .token')].map(e => +e.dataset.token)")
    shown.press("PageUp")
    assert selected(shown) == starts[-1]
    shown.press("ArrowUp")
    assert starts[-3] < selected(shown) < starts[-1]
    shown.press("ArrowDown")
    assert selected(shown) >= starts[-1]
    assert shown.js("document.activeElement.id") == "tokens"


def test_layers_and_heads_are_buttons_that_keep_the_focus(shown, nano):
    shown.click("#t140")
    shown.js("document.querySelector('[data-set=layer][data-value=\"2\"]').focus()")
    shown.js("document.activeElement.click()")
    assert shown.js("[document.activeElement.dataset.value, layer.value]") == ["2", "2"]
    assert shown.js("document.activeElement.ariaPressed") == "true"
    assert "edge" in text(shown, "#reach") and "76 " in text(shown, "#reach")
    shown.js("document.querySelector('[data-set=head][data-value=\"3\"]').click()")
    assert shown.js("document.getElementById('shade').value") == "attention"
    heat = shown.js(
        "[...document.querySelectorAll('.token')].map(e => +e.style.getPropertyValue('--heat'))"
    )
    seen = nano.sight.attention[2]
    assert heat.index(max(heat)) == seen.where[139, 3, 0]
    assert shown.js("document.querySelector('.token.edge').id") == "t76"
    assert (
        shown.js("document.querySelectorAll('.token.beyond').length") == 76 + len(nano.tokens) - 140
    )


def test_surprise_is_shaded_and_said(shown, nano):
    heat = shown.js(
        "[...document.querySelectorAll('.token')].map(e => +e.style.getPropertyValue('--heat'))"
    )
    bits = -nano.sight.expected.came / 0.6931
    for i in (5, 60, 130):
        assert abs(heat[i] - min(1, bits[i - 1] / 8)) < 2e-3
        label = shown.js(f"document.getElementById('t{i}').ariaLabel")
        assert float(re.search(r"surprise ([\d.]+) bits", label)[1]) == pytest.approx(
            bits[i - 1], abs=0.06
        )


def test_the_assistants_surprise_is_summed_up(shown, nano):
    bits = [0.0, *(-nano.sight.expected.came[:-1] / 0.6931)]
    own = [s for s in spans(nano.tokens, nano.tokenizer) if s.label != "user"]
    said = [bits[i] for s in own for i in range(s.body, s.stop)]
    mean = sum(said) / len(said)
    assert f"{len(said)} tokens had {mean:.2f} bits" in text(shown, "#about")


def test_routing_is_mapped_for_each_channel(shown, nano):
    assert shown.js("[...channel.options].map(o => o.value)") == ["", "user", "analysis", "final"]
    for channel, count in (("", len(nano.tokens)), ("final", None)):
        shown.js(f"channel.value = '{channel}'; channel.dispatchEvent(new Event('change'))")
        found = rows(shown, "#map")
        assert len(found) == 4 and {len(row) for row in found} == {9}
        shares = [[float(cell.rstrip(" %")) for cell in row[1:]] for row in found]
        assert [round(sum(row)) for row in shares] == [100] * 4
        assert count is None or f"over {count} tokens" in text(shown, "#map caption")


def test_all_tokens_can_be_read_as_a_table(shown, nano):
    shown.js("document.querySelector('#all summary').click()")
    shown.js("new Promise(done => setTimeout(done, 100))")
    table = rows(shown, "#all")
    assert len(table) == len(nano.tokens)
    assert table[20][5] == str(nano.sight.expected.rank[19])


def test_it_can_be_read_aloud(shown):
    for selector, role in (("#tokens", "listbox"), ("#t5", "option"), (".message", "group")):
        assert shown.js(f"document.querySelector('{selector}').getAttribute('role')") == role
    seen = [
        (node["role"]["value"].lower(), node["name"]["value"])
        for node in shown.send("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    ]
    named = {role for role, name in seen if name}
    wanted = "listbox option group table slider radio combobox button region rowheader".split()
    assert named >= set(wanted), named
    assert not [role for role, name in seen if role in wanted and not name]
    assert shown.js("document.querySelectorAll('[role=status]').length") == 2


def test_light_and_dark_differ_and_can_both_be_read(shown):
    grounds = []
    for scheme in ("light", "dark"):
        shown.colours(scheme)
        ground, ink, faint = (
            shown.js(f"getComputedStyle(document.querySelector('{where}')).{what}")
            for where, what in (("body", "backgroundColor"), ("body", "color"), (".hint", "color"))
        )
        assert contrast(ground, ink) > 10 and contrast(ground, faint) > 4.5
        for who in range(1, 4):
            label = shown.js(f"getComputedStyle(document.querySelectorAll('.who')[{who}]).color")
            assert contrast(ground, label) > 4.5
        grounds.append(luminance(ground))
    shown.colours("light")
    assert grounds[0] > 0.9 and grounds[1] < 0.02


def luminance(colour):
    """Of "rgb(1, 2, 3)"; https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_20b_conversation_of_any_words_opens(browser, tmp_path):
    words = Tokenizer.o200k_harmony()
    said = "<|start|>user<|message|></script><script>alert(1)</script>\nשלום \u202e 🏳️‍🌈<|end|>"
    tokens = words.encode_with_specials(said) + list(range(128, 160))
    path = tmp_path / "wide.html"
    path.write_text(page(wide(tokens), words, "20b & <more>"), encoding="utf-8")
    browser.open(path)
    assert browser.complaints == [] and browser.asked == [path.as_uri()]
    shown = browser.js("[...document.querySelectorAll('.token')].map(e => e.textContent).join('')")
    assert "</script><script>alert(1)</script>↵\nשלום" in shown
    assert browser.js("document.querySelectorAll('.token.bytes').length") > 5
    assert browser.js("document.title") == "20b & <more>"
    assert browser.js("document.querySelectorAll('.token').length") == len(tokens)
    assert browser.js("document.querySelectorAll('script').length") == 2
    browser.click(f"#t{len(tokens) - 1}")
    assert len(rows(browser, "#attention")) == 65
    assert len(rows(browser, "#map")) == 24


@pytest.mark.slow
def test_a_page_of_500_tokens_of_a_20b_opens(browser, tmp_path):
    """`-rA` shows how long it took; docs/look.md has the figure."""
    tokens = np.random.default_rng(3).integers(0, 199_000, 500).tolist()
    path = tmp_path / "500.html"
    path.write_text(page(wide(tokens), Tokenizer.o200k_harmony(), "20b"), encoding="utf-8")
    took = []
    for _ in range(5):
        browser.open(path)
        took.append(browser.js("performance.getEntriesByName('ready')[0].startTime"))
    assert browser.js("document.querySelectorAll('.token').length") == 500
    assert browser.complaints == []
    browser.js("choose({ token: 400 })")
    assert len(rows(browser, "#attention")) == 65
    chosen = "(() => { const from = performance.now(); choose({ token: 300 }); document.body"
    again = browser.js(f"{chosen}.offsetHeight; return performance.now() - from; }})()")
    size = path.stat().st_size
    print(f"{size} bytes; ready after {sorted(took)[2]:.0f} ms; another token {again:.0f} ms")
