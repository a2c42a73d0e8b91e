"""The sampling rule against a slow, literal reading of its sentence."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptoss.backends.protocol import Sampling
from gptoss.backends.sampling import sample, sample_rows

LOGITS = st.lists(st.integers(-6, 6), min_size=1, max_size=9).map(
    lambda row: np.asarray(row, np.float32) / 2
)
RULES = st.builds(
    Sampling,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 1.5]),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([0.1, 0.33, 0.5, 0.77, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.21, 0.6, 1.0]),
)
CLOSE = 1e-9  # nearer to an edge than this, rounding decides and nothing is claimed


def allowed(logits, rule):
    """[(token, probability)] after every filter, likeliest first; None where rounding decides."""
    weights = [float(np.exp(float(x) / rule.temperature)) for x in logits]
    row = sorted(enumerate(weights), key=lambda pair: (-logits[pair[0]], pair[0]))
    if rule.top_k > 0:
        row = row[: rule.top_k]
    total, kept, reached = sum(w for _, w in row), [], 0.0
    for token, weight in row:
        if abs(reached - rule.top_p) < CLOSE and rule.top_p < 1:
            return None
        if reached < rule.top_p or rule.top_p == 1.0:
            kept.append((token, weight))
        reached += weight / total
    best = kept[0][1]
    if any(abs(w / best - rule.min_p) < CLOSE and w != best for _, w in kept):
        return None
    kept = [(t, w) for t, w in kept if w >= rule.min_p * best]
    total = sum(w for _, w in kept)
    return [(t, w / total) for t, w in kept]


@settings(deadline=None)
@given(LOGITS, RULES, st.floats(0, 1, exclude_max=True))
def test_a_token_is_where_the_uniform_falls_among_what_the_filters_left(logits, rule, uniform):
    left = allowed(logits, rule)
    assume(left is not None)
    edges = np.cumsum([p for _, p in left])
    assume(min(abs(edges - uniform)) > CLOSE)
    expected = left[int((edges < uniform).sum())][0]
    assert sample(logits, rule, uniform) == expected


@settings(max_examples=50, deadline=None)
@given(LOGITS, RULES)
def test_every_token_left_is_drawn_as_often_as_its_share_and_no_other(logits, rule):
    left = allowed(logits, rule)
    assume(left is not None)
    n = 500
    drawn = [sample(logits, rule, (i + 0.5) / n) for i in range(n)]
    assert set(drawn) <= {token for token, _ in left}
    for token, share in left:
        assert abs(drawn.count(token) / n - share) <= 1 / n


@settings(deadline=None)
@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_temperature_zero_is_the_first_of_the_likeliest(logits, uniform):
    greedy = sample(logits, Sampling(temperature=0.0), uniform)
    assert greedy == list(logits).index(max(logits))
    assert sample(logits, Sampling(temperature=0.01, top_k=1), uniform) == greedy
    assert sample(logits, Sampling(top_p=1e-9), uniform) == greedy


@settings(deadline=None)
@given(LOGITS, RULES, st.floats(0, 1, exclude_max=True))
def test_more_padding_of_no_weight_changes_nothing(logits, rule, uniform):
    padded = np.concatenate([logits, np.full(5, -np.inf, np.float32)])
    assert sample(padded, rule, uniform) == sample(logits, rule, uniform)


@pytest.mark.parametrize("temperature", [1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy_without_a_warning(temperature):
    logits = np.asarray([-3e38, 1.0, 3e38, 3e38, -np.inf], np.float32)
    rule = Sampling(temperature=temperature)
    assert [sample(logits, rule, u) for u in (0.0, 0.49, 0.51, 0.99)] == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ([-np.inf, -np.inf], 0),
        ([0.0, np.nan, np.inf], 1),
        ([np.nan, np.nan], 0),
        ([0.0, np.inf, np.inf], 1),
    ],
)
@pytest.mark.parametrize("rule", [{}, {"temperature": 0.0}, {"top_k": 1}, {"min_p": 0.5}], ids=str)
def test_without_a_distribution_the_answer_is_argmax_without_a_warning(logits, token, rule):
    assert sample(np.asarray(logits, np.float32), Sampling(**rule), 0.9) == token


def test_rows_are_drawn_each_by_its_own_rule_and_uniform():
    logits = np.asarray([[0, 1, 2], [2, 1, 0], [0, 0, 0]], np.float32)
    rules = [Sampling(temperature=0.0), Sampling(top_k=1), Sampling()]
    assert sample_rows(logits, rules, [0.9, 0.9, 0.5]) == [2, 0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
    ],
)
def test_an_impossible_rule_is_refused_by_name(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=name):
        Sampling(**wrong)
