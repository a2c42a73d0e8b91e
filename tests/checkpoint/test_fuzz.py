"""Mutated checkpoints: opened, or refused with a ``CheckpointError``; never anything else.

Seeded, so that a failure comes back; the message holds the seed. Memory is counted: a lie in a
header must not make the reader allocate more than the file could explain.
"""

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss.checkpoint.open import LAYOUTS, open_checkpoint
from gptoss.checkpoint.safetensors import read
from gptoss.errors import CheckpointError
from tests.checkpoint.by_hand import canonical, described, glued, write

FILES = 6000
FOLDERS = 800
TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(32, dtype=np.uint8).reshape(2, 16),
    "empty": np.zeros((0, 7), np.float16),
    "scalar": np.array(3.0, np.float32),
    "z": np.arange(3, dtype=np.float16),
}
ODD: list[Any] = [
    *(0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, 10**5000),
    *(0.5, 1e308, float("inf"), float("nan"), True, None, "", "U8", "\0", "../x", "é" * 99),
    *([], {}, [[]], [0, 2**62], [2**40, 2**40, 0], {"a": {}}),
]


@pytest.fixture
def allowance() -> Iterator[Any]:
    """A measure: ``allowance(n)`` fails if more was allocated since last time than n explains."""
    tracemalloc.start()
    held = 0  # before: pytest keeps what was logged, and that is not the reader's

    def spent(size: int, what: str) -> None:
        nonlocal held
        now, peak = tracemalloc.get_traced_memory()
        peak, held = peak - held, now
        assert peak < 20 * size + (1 << 20), f"{what}: {peak} bytes for a file of {size}"
        tracemalloc.reset_peak()

    yield spent
    tracemalloc.stop()


def dumped(value: Any) -> bytes:
    """JSON of any number, even one Python declines to print."""
    text = json.dumps(value, default=str) if not _endless(value) else None
    return (text or json.dumps(_without(value)).replace('"ENDLESS"', "9" * 5000)).encode()


def _endless(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_endless, value.values()))
    if isinstance(value, list):
        return any(map(_endless, value))
    return isinstance(value, int) and abs(value) > 10**40


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without(v) for v in value]
    return "ENDLESS" if _endless(value) else value


def twisted(value: Any, rng: Random) -> Any:
    """The value with one thing in it replaced, dropped, renamed or nudged."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != name}
            case 1:
                return {(k + rng.choice(["", "x", "\x7f"])): v for k, v in value.items()}
            case 2:
                return value | {rng.choice(["new", "__metadata__"]): rng.choice(ODD)}
            case _:
                return value | {name: twisted(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], twisted(value[i], rng), *value[i + rng.randrange(2) :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 7, -8, 256])
    return rng.choice(ODD)


def bent(raw: bytes, rng: Random) -> bytes:
    """Bytes flipped, cut, doubled, spliced or overwritten; the front is hit most."""
    reach = rng.choice([8, 64, len(raw)])
    at = rng.randrange(max(1, min(reach, len(raw))))
    to = min(len(raw), at + rng.randrange(1, 40))
    match rng.randrange(7):
        case 0:
            return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
        case 1:
            return raw[: rng.randrange(len(raw))]
        case 2:
            return raw[:at] + rng.randbytes(to - at) + raw[to:]
        case 3:
            return raw[:at] + raw[to:]
        case 4:
            return raw[:to] + raw[at:]
        case 5:
            there = rng.randrange(len(raw))
            return raw[:at] + raw[there : there + to - at] + raw[to:]
        case _:
            piece = rng.choice([b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b"\xff\xfe", b'"', b"-"])
            return raw[:at] + piece + raw[at:]


def mutated(rng: Random) -> bytes:
    header, body = described(TENSORS)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        header = twisted(header, rng)
    raw = glued(dumped(header), body)
    for _ in range(rng.choice([0, 0, 1, 1, 3])):
        raw = bent(raw or b"\0", rng)
    if rng.random() < 0.2 and len(raw) > 16:  # the length made true again: deeper damage is met
        end = max(raw.rfind(b"}"), 8) + 1
        raw = (end - 8).to_bytes(8, "little") + raw[8:]
    return raw


def refused(path: Path, seed: object) -> bool:
    """Read a file to its last value. What we accept, the official library accepts, and equally."""
    try:
        tensors = read(path)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"seed {seed}: {error}"
        return True
    arrays = {name: tensor.array() for name, tensor in tensors.items()}
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == set(arrays), f"seed {seed}"
        for name, array in arrays.items():
            if array.dtype.name in ("float32", "float16", "uint8"):
                assert file.get_tensor(name).tobytes() == array.tobytes(), f"seed {seed}: {name}"
    return False


def test_no_mutated_file_does_anything_but_open_or_be_refused(
    tmp_path: Path, allowance: Any
) -> None:
    path, bad = tmp_path / "x.safetensors", 0
    for seed in range(FILES):
        raw = mutated(Random(seed))
        path.unlink(missing_ok=True)  # a mapped file must not be overwritten
        path.write_bytes(raw)
        allowance(1 << 20, "making the file")
        bad += refused(path, seed)
        allowance(len(raw), f"seed {seed}")
    assert FILES // 2 < bad < FILES - 200, f"{bad} of {FILES} refused: the mutations are lopsided"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F32", "F4", "BOOL", 8]),
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from([2**32, 2**62]), max_size=4),
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3),
    }
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    header=json_values | st.dictionaries(st.text(), fields | json_values, max_size=3),
    body=st.binary(max_size=40),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_no_header_at_all_does_anything_else(
    tmp_path: Path, header: Any, body: bytes, length: int | None
) -> None:
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(glued(header, body, length))
    refused(path, "of hypothesis")


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=200))
def test_no_bytes_at_all_do_anything_else(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    refused(path, "of hypothesis")


def spoil(folder: Path, rng: Random) -> None:
    """Change one file of a directory: its bytes, its JSON, its name or its being there."""
    file = rng.choice(sorted(folder.iterdir()))
    if file.is_dir():
        return
    match rng.randrange(8):
        case 0:
            file.unlink()
        case 1:
            file.rename(folder / rng.choice(["a.part", "b.safetensors", "config.json", "x"]))
        case 2:
            copy = folder / rng.choice(["copy.safetensors", "model.safetensors"])
            replaced(copy, file.read_bytes())
        case 3 | 4:
            replaced(file, bent(file.read_bytes() or b"\0", rng))
        case _:
            file = folder / rng.choice(["config.json", "model.safetensors.index.json"])
            if file.exists():
                try:
                    value = json.loads(file.read_bytes())
                except (ValueError, RecursionError):
                    return
                for _ in range(rng.choice([1, 1, 3])):
                    value = twisted(value, rng)
                replaced(file, dumped(value))


def replaced(file: Path, raw: bytes) -> None:
    file.unlink(missing_ok=True)  # linked to the good one, whose bytes are to stay
    file.write_bytes(raw)


def test_no_mutated_directory_does_anything_but_open_or_be_refused(
    tmp_path: Path, allowance: Any
) -> None:
    weights, bad = canonical(), 0
    good = [
        write(tmp_path / f"{name}{shards}", layout, weights, shards=shards)
        for name, layout in LAYOUTS.items()
        for shards in (0, 2)
    ]
    for seed in range(FOLDERS):
        rng, folder = Random(seed), tmp_path / "spoiled"
        shutil.copytree(rng.choice(good), folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
        for _ in range(rng.choice([1, 1, 2])):
            spoil(folder, rng)
        size = sum(file.stat().st_size for file in folder.iterdir())
        allowance(16 << 20, "spoiling")
        try:
            opened = open_checkpoint(folder)
            for name in weights:
                opened.read(name)
        except CheckpointError as error:
            assert "\n" not in str(error), f"seed {seed}: {error}"
            bad += 1
        allowance(size, f"seed {seed}")
        shutil.rmtree(folder)
    assert FOLDERS // 2 < bad < FOLDERS - 50, f"{bad} of {FOLDERS} refused: lopsided"
