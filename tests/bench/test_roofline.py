"""The machine's limits are positive, ordered, and measured by whoever is there."""

import pytest

from gptoss.bench import roofline
from gptoss.bench.roofline import Roofline


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(roofline, "BUFFER", 8 << 20)
    monkeypatch.setattr(roofline, "LARGEST", 8 << 20)
    monkeypatch.setattr(roofline, "PASSES", 2)


@pytest.fixture(params=["core", "numpy"])
def measured(request, short, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(roofline, "_core", lambda: None)
    roof = Roofline()
    if roof.source != request.param:
        pytest.skip("the compiled core is not installed, or has no roofline")
    roof.measure()
    roof.measure()
    return roof


def test_limits_are_those_of_a_computer(measured):
    assert len(measured.bandwidths) == 2
    assert 1e8 < measured.bandwidth == max(measured.bandwidths) < 1e13
    isa, peak = measured.peak("float32")
    assert isa in measured.peaks and 1e8 < peak < 1e15


def test_numpy_does_not_know_of_bytes(short, monkeypatch):
    monkeypatch.setattr(roofline, "_core", lambda: None)
    roof = Roofline()
    roof.measure()
    assert roof.peak("int8") is None and set(roof.peaks) == {"numpy"}


def test_the_best_of_all_instruction_sets_and_measurements_counts(monkeypatch):
    class Core:
        bandwidths, rates = [3.0, 7.0, 5.0], [1.0, 9.0, 2.0]

        def read_bandwidth(self, bytes, passes):
            return self.bandwidths.pop()

        def peaks(self, passes):
            rate = self.rates.pop()
            return [("portable", 4.0, 0.0), ("avx2", rate, 8.0), ("vnni", rate, 16.0)]

    monkeypatch.setattr(roofline, "_core", Core)
    roof = Roofline()
    for _ in range(3):
        roof.measure()
    assert roof.bandwidth == 7.0
    assert roof.peak("float32") == ("avx2", 9.0)
    assert roof.peak("int8") == ("vnni", 16.0)
    assert "int8" not in roof.peaks["portable"]


def test_the_core_refuses_nothing_to_read():
    core = Roofline().core
    if core is None:
        pytest.skip("the compiled core is not installed, or has no roofline")
    for bad in [{"bytes": 0, "passes": 1}, {"bytes": 1, "passes": 0}]:
        with pytest.raises(ValueError, match="at least 1"):
            core.read_bandwidth(**bad)
    with pytest.raises(ValueError, match="at least 1"):
        core.peaks(0)


def test_the_buffer_is_larger_than_the_caches():
    assert roofline.buffer_size() >= roofline.BUFFER
    assert roofline.buffer_size() >= min(roofline.LARGEST, 4 * roofline.last_caches())


def test_caches_that_cores_share_count_once(monkeypatch, tmp_path):
    for cpu, shared in [("cpu0", "0-1"), ("cpu1", "0-1"), ("cpu2", "2")]:
        folder = tmp_path / cpu / "cache" / "index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text("32768K\n")
        (folder / "shared_cpu_list").write_text(shared)
    monkeypatch.setattr(roofline, "CACHES", tmp_path)
    assert roofline.last_caches() == 2 * 32 << 20
