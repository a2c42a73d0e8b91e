"""The compiled part, where there is one: it tells the truth about the processor."""

import platform
from pathlib import Path

import pytest

ASKED = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"}
CPUINFO = Path("/proc/cpuinfo")

core = pytest.importorskip("gptoss._core", reason="gptoss was installed without a compiler")


def test_the_features_are_names():
    found = core.cpu_features()
    assert isinstance(found, list) and all(isinstance(name, str) for name in found)
    assert len(set(found)) == len(found)


@pytest.mark.skipif(
    not CPUINFO.exists() or platform.machine() not in ("x86_64", "i686"), reason="not Linux on x86"
)
def test_the_features_are_those_the_system_reports():
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    assert set(core.cpu_features()) == ASKED & set(flags.split(":")[1].split())
