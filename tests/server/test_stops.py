"""Stop strings, wherever the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.engine import Drawn
from gptoss.server.stops import StopStrings

letters = st.text("ab", max_size=12)


@given(st.lists(letters, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_comes_out_is_the_text_before_the_first_stop(pieces, stops):
    watch, out = StopStrings(stops), []
    for i, piece in enumerate(pieces):
        out.append(watch.feed(piece, (Drawn(i, None),)))
        if watch.found is not None:
            break
    else:
        out.append(watch.flush())
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    said = "".join(text for text, _ in out)
    assert said == whole[: min(ends)[1] if ends else None], "the first to be complete counts"
    assert (watch.found is not None) == bool(ends)
    tokens = [d.token for _, drawn in out for d in drawn]
    assert tokens == sorted(set(tokens)), "each token once, in order"
    if not ends:
        assert tokens == [*range(len(pieces))]
    starts = [len("".join(pieces[:i])) for i in tokens]
    assert all(
        at < len(said) or not pieces[i] or not ends for i, at in zip(tokens, starts, strict=True)
    )


@pytest.mark.parametrize("pieces", [["a to= b"], ["a ", "to", "= b"], [*"a to= b"]])
def test_however_tokens_cut_the_text_the_same_string_ends_it(pieces):
    watch = StopStrings(["to=", "o"])
    out = [watch.feed(piece)[0] for piece in pieces if watch.found is None]
    assert "".join(out) == "a t" and watch.found == "o"


def test_nothing_is_held_back_without_need():
    watch = StopStrings(["END"])
    assert watch.feed("text E")[0] == "text "
    assert watch.feed("m")[0] == "Em"
    assert watch.feed("EN")[0] == ""
    assert watch.flush()[0] == "EN"
