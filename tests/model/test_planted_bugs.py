"""Every planted bug of ``gptoss.verify.mutants``: stored traces of ``transformers`` must notice.

No torch is needed, and each takes a fraction of a second.
"""

import numpy as np
import pytest

from gptoss.model import mxfp4
from gptoss.verify.mutants import BUGS, planted
from tests.model.cases import (
    STORED,
    TOLERANCE,
    Golden,
    Trace,
    errors,
    first_divergence,
    golden,
    reference_trace,
)


@pytest.fixture(scope="module")
def stored() -> dict[str, Golden]:
    """The traces of ``tests/golden``."""
    return {name: golden(name) for name in STORED}


def trace_of(case: Golden, pieces: int = 3) -> Trace:
    """The rows of a stored case, batched, in several steps each."""
    return reference_trace(case.config, case.weights, case.rows, pieces=pieces)


@pytest.mark.parametrize("pieces", [1, 2, 3, 9])
@pytest.mark.parametrize("name", STORED)
def test_without_a_bug_nothing_diverges(stored, name, pieces):
    found = errors(trace_of(stored[name], pieces), stored[name].trace)
    assert first_divergence(found, TOLERANCE / 10) is None, f"worst: {max(found.values()):.1e}"


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # some bugs overflow
@pytest.mark.parametrize("what", BUGS)
def test_bug_is_caught_where_it_was_planted(stored, what):
    first = BUGS[what].first
    with planted(what):
        found = {name: errors(trace_of(case), case.trace) for name, case in stored.items()}
    shown = {name: first_divergence(f) for name, f in found.items()}
    assert set(shown.values()) - {None} == {first}, f"{what}: first diverges at {shown}"
    assert max(f[first] for f in found.values()) > 10 * TOLERANCE  # nor is it a near miss


def test_the_stored_traces_are_of_the_cases_they_are_named_after(stored):
    for name, case in stored.items():
        assert case.config == STORED[name].config
        assert case.rows == STORED[name].tokens
        assert case.provenance["transformers"]
        for key, x in STORED[name].weights.items():
            mine = case.weights[key]
            if isinstance(x, mxfp4.Packed):
                assert np.array_equal(mine.blocks, x.blocks)
                assert np.array_equal(mine.scales, x.scales)
            else:
                assert np.array_equal(mine, x), key
