"""Rewards: found by name, added up, and named when they fail."""

import pytest

from gptoss.errors import TrainingError
from gptoss.text.messages import Message
from gptoss.train.reward import Rewards

THOUGHT = Message(role="assistant", channel="analysis", content="a" * 90)
SAID = Message(role="assistant", channel="final", content=" 42\n")
MENDED = Message(role="assistant", channel="final", content="42", repairs=("no <|end|>",))
CALL = Message(role="assistant", channel="commentary", recipient="functions.f", content="{}")


def judged(terms, messages, example=None):
    return Rewards(terms)([], messages, example or {"answer": 42}, "a.jsonl line 3")


def own(prompt, reply, messages, example):
    return {"yes": 1, "nan": float("nan")}.get(reply) or 1 / 0


@pytest.mark.parametrize(
    "name, messages, value",
    [
        ("exact", [THOUGHT, SAID], 1.0),
        ("exact", [THOUGHT], 0.0),
        ("exact", [], 0.0),
        ("format", [THOUGHT, SAID], 1.0),
        ("format", [THOUGHT, CALL], 1.0),
        ("format", [THOUGHT], 0.0),
        ("format", [SAID, SAID], 0.0),
        ("format", [SAID, THOUGHT], 0.0),
        ("format", [MENDED], 0.0),
        ("format", [], 0.0),
        ("brief", [THOUGHT, SAID], -0.094),
    ],
)
def test_ours(name, messages, value):
    assert judged([name], messages)[0] == pytest.approx(value)


def test_a_sum_has_weights_and_says_its_terms():
    total, parts = judged(["exact", "0.5*format", "-2*brief"], [THOUGHT, SAID])
    assert total == pytest.approx(1 + 0.5 + 2 * 0.094)
    assert parts == pytest.approx({"exact": 1.0, "format": 1.0, "brief": -0.094})


def test_functions_come_from_files_and_modules(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("WORTH = 3\ndef worth(prompt, reply, messages, example):\n    return WORTH\n")
    total, parts = judged([f"2*{path}:worth", "gptoss.train.reward:exact"], [SAID])
    assert total == 7.0
    assert list(parts) == [f"{path}:worth", "gptoss.train.reward:exact"]


@pytest.mark.parametrize(
    "told, message",
    [
        ("exakt", r"reward 'exakt': there are exact, format, brief; others are told as"),
        ("gptoss.train.reward:none", "cannot be loaded: AttributeError"),
        ("missing.py:f", "cannot be loaded: FileNotFoundError"),
        ("gptoss.train.reward:OURS", "is no function"),
    ],
)
def test_what_is_no_reward_is_named(told, message):
    with pytest.raises(TrainingError, match=message):
        Rewards([told])


@pytest.mark.parametrize("terms", [[], ["exact", "exact"], ["x*exact"]])
def test_a_sum_that_means_nothing_is_refused(terms):
    with pytest.raises(ValueError):
        Rewards(terms)


@pytest.mark.parametrize(
    "reply, message",
    [
        ("no", "the reward own raised ZeroDivisionError: division by zero. Nothing is lost"),
        ("nan", "the reward own is nan, which is no number"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_example(reply, message):
    with pytest.raises(TrainingError, match=f"^a.jsonl line 3: {message}") as e:
        judged([own], [Message(role="assistant", channel="final", content=reply)])
    assert "\n" not in str(e.value)


def test_exact_needs_an_answer():
    with pytest.raises(TrainingError, match="the line has no answer to compare with"):
        judged(["exact"], [SAID], {"messages": []})
