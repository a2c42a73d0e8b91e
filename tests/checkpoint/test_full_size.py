"""gpt-oss-20b at its full 13.8 GB: the figures that small models cannot show. Needs 30 GB of disk.

Every step runs in a process of its own, whose peak resident memory the system measures.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gptoss
from gptoss.checkpoint.open import open_checkpoint
from gptoss.checkpoint.synthesize import reader
from gptoss.model.config import gpt_oss_20b
from gptoss.model.mxfp4 import Packed

pytestmark = pytest.mark.slow

SEED = 20
NBYTES = 13_761_264_768  # of tensors
# Run `step`, then print its seconds and the peak of resident memory in bytes.
AROUND = """
import dataclasses, json, sys, time
from gptoss.checkpoint.open import open_checkpoint
from gptoss.checkpoint.save import convert
from gptoss.checkpoint.synthesize import synthesize
from gptoss.model.config import gpt_oss_20b
begin = time.perf_counter()
{step}
seconds = time.perf_counter() - begin
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([seconds, int(status["VmHWM"].split()[0]) * 1024]))
"""


def measured(step: str, *arguments: object) -> tuple[float, float]:
    """Seconds and peak bytes of ``step``; ``arguments`` are its ``sys.argv[1:]``."""
    command = [sys.executable, "-c", AROUND.format(step=step), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(*gptoss.__path__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seconds, peak = json.loads(done.stdout)
    print(f"{step}: {seconds:.2f} s, peak RSS {peak / 1e6:.0f} MB")
    return seconds, peak


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    room = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(room).free < 30e9:
        pytest.skip(f"{room} has less than 30 GB free")
    seconds, peak = measured(
        f"synthesize(gpt_oss_20b(), sys.argv[1], seed={SEED})", room / "huggingface"
    )
    print(f"{NBYTES / seconds / 1e6:.0f} MB/s")
    assert peak < 2e9
    yield room / "huggingface"
    shutil.rmtree(room)


def test_opening_reads_headers_only(whole):
    assert sum(path.stat().st_size for path in whole.glob("*.safetensors")) - NBYTES < 1e6
    _, peak = measured("open_checkpoint(sys.argv[1])", whole)
    assert peak < 500e6


def test_converting_needs_little_memory_and_keeps_every_value(whole):
    target = whole.with_name("original")
    try:
        seconds, peak = measured("convert(*sys.argv[1:], 'original')", whole, target)
        print(f"{NBYTES / seconds / 1e6:.0f} MB/s")
        assert peak < 2e9
        read, drawn = open_checkpoint(target).read, reader(gpt_oss_20b(), SEED)
        for name in ("block.0.mlp.mlp1_weight", "block.23.mlp.mlp2_weight"):
            found, expected = read(name), drawn(name)
            assert isinstance(found, Packed) and isinstance(expected, Packed)
            assert np.array_equal(found.blocks, expected.blocks), name
            assert np.array_equal(found.scales, expected.scales), name
        for name in ("block.11.attn.qkv.weight", "block.12.mlp.mlp1_bias", "embedding.weight"):
            assert np.array_equal(read(name).view(np.uint16), drawn(name).view(np.uint16)), name
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_decoding_two_full_layers_needs_little_memory(whole):
    source, target = whole.with_name("two"), whole.with_name("two-bf16")
    step = "synthesize(dataclasses.replace(gpt_oss_20b(), num_hidden_layers=2), sys.argv[1])"
    measured(step, source)
    _, peak = measured("convert(*sys.argv[1:], 'huggingface-bf16')", source, target)
    assert peak < 2e9
    packed, dense = open_checkpoint(source).read, open_checkpoint(target).read
    for name in ("block.0.mlp.mlp1_weight", "block.1.mlp.mlp2_weight"):
        expert = dense(name)[31]
        assert np.array_equal(expert.astype(np.float32), packed(name)[31].decode()), name
    shutil.rmtree(source)
    shutil.rmtree(target)
