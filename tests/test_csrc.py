"""The core's own tests, which need no Python: built and run plain and under sanitizers."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SANITIZERS = {
    "plain": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
CROSS = "aarch64-linux-gnu-g++"

pytestmark = pytest.mark.slow


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]


def build(folder, *settings):
    run("cmake", "-S", ROOT, "-B", folder, "-DGPTOSS_TESTS=ON", *settings)
    run("cmake", "--build", folder, "--parallel", str(os.cpu_count()))


def compiler():
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not found or not shutil.which("cmake"):
        pytest.skip("no C++ compiler, or no cmake")
    return found


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_core(sanitizer, tmp_path):
    flags = SANITIZERS[sanitizer]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    command = [*compiler().split(), *flags.split(), empty, "-o", tmp_path / "empty"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"the compiler lacks {flags}")
    build(tmp_path / "build", f"-DCMAKE_CXX_FLAGS=-g1 {flags}")
    run("ctest", "--test-dir", tmp_path / "build", "--output-on-failure")


@pytest.fixture(scope="module")
def arm_build(tmp_path_factory):
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("test_core runs NEON here")
    if not all(map(shutil.which, (CROSS, "qemu-aarch64", "cmake"))):
        pytest.skip(f"no {CROSS}, or no qemu-aarch64 to run what it makes, or no cmake")
    folder = tmp_path_factory.mktemp("arm")
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    build(folder, *system, f"-DCMAKE_CXX_COMPILER={CROSS}")
    return folder


@pytest.mark.parametrize("processor", ["cortex-a53", "neoverse-n1", "max"])  # one for each table
def test_core_on_arm(processor, arm_build):
    for test in sorted(arm_build.glob("test_*")):
        run("qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu", test)
