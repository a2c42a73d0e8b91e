"""What would not end, or would eat the memory, does so in another process and not for long."""

import sys
import time

import pytest

from gptoss.errors import GptOssError, GrammarError
from gptoss.grammar import JsonSchema, Lark, Regex, constrain, constraint, trial
from gptoss.text.tokenizer import Tokenizer
from tests.text.conftest import NANO_SPECIALS

INTERSECTION = {"allOf": [{"type": "string", "pattern": f"a{{{i}}}(b|c)*d"} for i in range(1, 30)]}


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of processes")
def test_a_schema_that_compiles_without_end_is_stopped(nano, monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 1)
    with pytest.raises(GrammarError, match="did not compile within 1 seconds"):
        constrain(nano, format=JsonSchema(INTERSECTION))
    started = time.process_time()
    with pytest.raises(GrammarError, match="did not compile"):  # remembered
        constrain(nano, format=JsonSchema(INTERSECTION))
    assert time.process_time() - started < 0.1


def test_patience_ends_where_nothing_counts_the_processor(nano, monkeypatch):
    monkeypatch.setattr(trial, "PATIENCE", 0.01)
    with pytest.raises(GrammarError, match="did not compile within 0 seconds"):
        constrain(nano, format=JsonSchema({"type": "integer", "maximum": 17}))


def test_what_has_no_text_at_all_is_found_before_it_is_used(nano):
    with pytest.raises(GrammarError, match="no text at all satisfies it"):
        constrain(nano, format=Lark("start: A\nA: /a/ & /b/"))


def test_what_compiles_there_compiles_here(nano):
    assert constrain(nano, format=Regex("[a-z]+")) is not None


def test_a_grammar_that_grows_too_large_while_it_is_followed_says_so(nano, monkeypatch):
    few = trial.limits()
    small = type(few)(max_lexer_states=30, verbose_errors=False)
    monkeypatch.setattr(constraint, "limits", lambda: small)
    fresh = Tokenizer({bytes([b]): b for b in range(256)}, dict(nano.specials))
    c = constrain(fresh, format=Regex("(a|b)*a(a|b){500}"))
    header = "<|channel|>final<|message|>"
    with pytest.raises(GrammarError, match="cannot be followed any further"):
        for token in fresh.encode_with_specials(header + "abba" * 100):
            c.mask()
            c.accept(token)


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    words = Tokenizer(
        {bytes([b]): b for b in range(256)}, {n: 256 + i for i, n in enumerate(NANO_SPECIALS)}
    )
    with pytest.raises(GptOssError, match=r"pip install 'gptoss\[serve\]'"):
        constrain(words, format=Regex("a"))
