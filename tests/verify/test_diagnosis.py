"""The kit names every planted bug, and suspects nobody who has none."""

import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.errors import BackendUnavailable
from gptoss.verify.diagnosis import RIGHT, diagnose, judge
from gptoss.verify.mutants import BUGS, planted
from gptoss.verify.patients import answers, local, said
from gptoss.verify.probes import PROBE
from tests.verify.conftest import REST

EQUAL = {"positions counted from one"}  # attention sees differences of positions only
TWINS = [  # the same function, got wrong in two places
    {"ramp upside down", "beta fast and slow swapped"},
    {"no sink", "shares with the sink's sum to one again"},
]
FAINT = {"gate clamped from below too"}  # 5e-5 of an activation: under what bfloat16 rounds


@pytest.fixture(scope="module")
def ours(probe, seen):
    """What the reference says of the same candidates, right and with each bug."""
    read = probe.__getitem__
    right = {RIGHT: answers(PROBE, read, seen)}
    return right | {name: answers(PROBE, read, seen, name) for name in BUGS}


def noisy(said, nats, seed=0):
    draw = np.random.default_rng(seed)
    return said + nats * draw.standard_normal(said.shape)


def test_there_are_enough_bugs():
    assert len(BUGS) > 25
    assert set(BUGS) >= EQUAL | FAINT


@pytest.mark.parametrize("nats", [0.0, 0.01])  # as float32, and as bfloat16 rounds
def test_every_bug_is_named(ours, nats):
    hidden = EQUAL | (FAINT if nats else set())
    for name in set(BUGS) - hidden:
        found = judge(noisy(ours[name], nats), ours)
        same = next((twins for twins in TWINS if name in twins), {name})
        assert set(found.suspects) == same, f"{name} is taken for {found.fits}"
        assert found.explained and not found.healthy


@pytest.mark.parametrize("nats", [0.0, 0.01])
def test_who_has_no_bug_is_suspected_of_none(ours, nats):
    hidden = EQUAL | (FAINT if nats else set())
    for seed in range(5):
        found = judge(noisy(ours[RIGHT], nats, seed), ours)
        assert found.healthy and not found.suspects
        assert set(found.fits) == hidden | {RIGHT}


def test_what_no_bug_of_the_list_explains_is_not_healthy(ours):
    found = judge(noisy(ours[RIGHT], 0.2), ours)
    assert not found.healthy and not found.explained
    assert "no bug of the list explains it" in str(found)


@pytest.mark.parametrize(
    "name, how",
    [
        ("native", {"precision": "exact"}),
        ("native", {"precision": "fast"}),
        ("torch", {"dtype": "float32"}),
        ("torch", {"dtype": "bfloat16"}),
        *(pytest.param(name, how, marks=pytest.mark.slow) for name, how in REST),
    ],
)
def test_our_own_backends_have_none(probe, ours, seen, name, how):
    """The same texts, forced through the backend, so that the answers above serve."""
    try:
        backend = load_backend(name, PROBE, probe.__getitem__, **how)
    except BackendUnavailable as missing:
        pytest.skip(str(missing))
    found = judge(said(backend, seen), ours)
    rounded = how.get("precision") == "small"  # to 4 bits: farther off than bugs are
    assert not found.suspects and found.healthy != rounded, str(found)


def test_two_bugs_at_once_are_two_bugs(probe, asked, monkeypatch):
    two = ["no sink", "plain SiLU"]
    some = {name: BUGS[name] for name in [*two, "no final norm", "no router bias"]}
    monkeypatch.setattr("gptoss.verify.diagnosis.BUGS", some)
    read = probe.__getitem__
    with planted(*two):
        patient = local(load_backend("reference", PROBE, read))
        told = {len(prompt): patient(prompt) for prompt in asked}
    found = diagnose(PROBE, read, lambda prompt: told[len(prompt)], asked)
    assert found.suspects == [" + ".join(two)]


def test_bugs_are_gone_when_they_were_there(probe, seen, ours):
    for name in ("nibbles in GGUF's order", "YaRN range rounded", "no sink"):
        with planted(name):
            pass
    again = answers(PROBE, probe.__getitem__, seen)
    assert np.array_equal(again, ours[RIGHT])


def test_bugs_of_one_passage_exclude_each_other():
    with (
        pytest.raises(ValueError, match="does not go with"),
        planted("no sink", "sink dropped from the front"),
    ):
        pass
    with pytest.raises(ValueError, match="no bug called 'hiccups'"), planted("hiccups"):
        pass
