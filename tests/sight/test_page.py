"""The file: whole in itself, small enough, and safe whatever the words are."""

import base64
import hashlib
import json
import re
import zlib

import numpy as np

from gptoss.sight.page import packed, page
from gptoss.text.tokenizer import Tokenizer
from tests.sight.cases import wide


def unpacked(raw):
    """The header, and the arrays it lists."""
    start = 4 + int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4:start])
    assert start % 4 == 0 and all(offset % 4 == 0 for _, offset, _ in head["arrays"].values())
    arrays = {
        name: np.frombuffer(raw, kind, size, start + offset)
        for name, (kind, offset, size) in head["arrays"].items()
    }
    return head, arrays


def test_everything_comes_out_as_it_went_in(nano):
    head, arrays = unpacked(packed(nano.sight, nano.tokenizer))
    sight, (T, L, H) = nano.sight, (len(nano.tokens), 4, 4)
    ids = arrays["ids"]
    assert (ids[arrays["tokens"]] == nano.tokens).all()
    assert (ids[arrays["expected_token"]].reshape(T, 10) == sight.expected.likeliest).all()
    assert (ids[arrays["lens_token"]].reshape(T, L, 5)[:, 2] == sight.lens[2].likeliest).all()
    assert (arrays["lens_rank"].reshape(T, L)[:, 1] == sight.lens[1].rank).all()
    assert (arrays["chosen"].reshape(T, L, 2) == sight.chosen).all()
    came = arrays["expected_came"][:-1] / -1000
    np.testing.assert_allclose(came, sight.expected.came[:-1], atol=6e-4)
    np.testing.assert_allclose(arrays["share"].reshape(T, L, 2) / 255, sight.share, atol=2.1e-3)
    sink = arrays["sink"].reshape(T, L, H) / 255
    np.testing.assert_allclose(sink[:, 3], sight.attention[3].sink, atol=2.1e-3)
    first = np.cumsum([0, *arrays["sources"]]).tolist()
    for p, layer, h in ((0, 0, 0), (100, 1, 2), (150, 3, 3)):
        at = (p * L + layer) * H + h
        mine = slice(first[at], first[at + 1])
        weight = sight.attention[layer].weight[p, h]
        np.testing.assert_allclose(arrays["weight"][mine] / 255, weight[weight > 0], atol=2.1e-3)
        assert (arrays["where"][mine] == sight.attention[layer].where[p, h][weight > 0]).all()
    assert first[-1] == len(arrays["weight"]) == len(arrays["where"])
    assert head["windows"] == [64, None, 64, None]
    assert [s[0] for s in head["spans"]] == "user analysis final user analysis final".split()


def test_nothing_in_it_leads_outside(nano):
    text = page(nano.sight, nano.tokenizer, "nano")
    shown, data, _ = re.split(r'<script type="text/plain" id="data">([^<]*)</script>', text)
    assert zlib.decompress(base64.b64decode(data)) == packed(nano.sight, nano.tokenizer)
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|src=", shown)
    assert re.findall(r'(?:href|action)="([^"]*)"', shown) == ["data:,"]


def test_only_its_own_script_and_style_may_run(nano):
    text = page(nano.sight, nano.tokenizer, "nano")
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        [inside] = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_words_never_become_markup(nano):
    words = nano.tokenizer.encode("</script><script>alert(1)</script><!-- {{data}} \\1")
    sight = wide(words, nano.config)  # noise, of this vocabulary
    for reading in (sight.expected, *sight.lens):
        reading.likeliest[:] %= 1024
    plain, odd = (page(sight, nano.tokenizer, title) for title in ("x", '"><script>{{data}}'))
    assert plain.count("<script") == odd.count("<script") == 2
    assert plain.count("</script") == odd.count("</script") == 2
    assert "&quot;&gt;&lt;script&gt;{{data}}" in odd


def test_five_hundred_tokens_of_a_20b_are_less_than_5_mb():
    words = Tokenizer.o200k_harmony()
    tokens = np.random.default_rng(3).integers(0, 199_000, 500).tolist()
    text = page(wide(tokens), words, "20b")
    assert len(text.encode()) < 5_000_000
    [data] = re.findall(r'id="data">([^<]*)<', text)
    head, arrays = unpacked(zlib.decompress(base64.b64decode(data)))
    assert arrays["ids"][arrays["tokens"]].tolist() == tokens
    assert head["layers"] == 24 and len(arrays["sink"]) == 500 * 24 * 64
