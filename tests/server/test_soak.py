"""Mixed streams, some of which hang up: the others say what they say alone, and nothing stays."""

import pytest

from tests.server.soak import soak


def test_a_brief_soak_leaves_nothing_behind():
    facts, wrong = soak(streams_=12, seconds=60, requests=60)
    assert not wrong, wrong
    assert facts["answered"] + facts["dropped"] == facts["asked"] >= 60, facts
    assert facts["answered"] > 30 and facts["dropped"], "else little was tried"
    assert not any(facts["left"].values()), facts


@pytest.mark.slow
def test_64_streams_for_five_minutes_leave_nothing_behind_and_memory_flat():
    facts, wrong = soak(streams_=64, seconds=300)
    assert not wrong, wrong
    assert facts["answered"] + facts["dropped"] == facts["asked"], facts
    assert not any(facts["left"].values()), facts
    _, warm, end = facts["megabytes"]
    assert end < warm + 32, facts
