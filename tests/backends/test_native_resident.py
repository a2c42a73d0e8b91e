"""Experts on disk: the same numbers in a fraction of the memory."""

import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from gptoss.backends.protocol import Batch
from gptoss.checkpoint.open import open_checkpoint
from gptoss.checkpoint.synthesize import synthesize
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import Packed, encode

pytest.importorskip("gptoss._core", reason="the compiled core is not built")
from gptoss.backends.native import NativeBackend, resident
from gptoss.backends.native.resident import AROUND, PIECE, Resident, Span, spans

CONFIG = ModelConfig(
    num_hidden_layers=4,
    hidden_size=512,
    vocab_size=256,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    num_experts=8,
    experts_per_token=2,
    intermediate_size=1024,
    sliding_window=32,
)
EXPERT = 3 * 512 * 1024 * 17 // 32
LAYER, ALL = 8 * EXPERT, 32 * EXPERT
LAYOUTS = ("huggingface", "original")


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("experts") / "random"
    return open_checkpoint(synthesize(CONFIG, path, request.param))


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


def steps(backend, lengths):
    """Logits of a row that arrives in steps of these lengths."""
    cache, past, tokens = backend.new_cache(max_tokens=1000), 0, text(sum(lengths))
    slot = cache.open()
    for n in lengths:
        batch = Batch.of([tokens[past : past + n]], [past], [slot], range(n))
        yield backend.forward(batch, cache)
        past += n


def mapped_bytes(checkpoint):
    """How much of the checkpoint's files this process has in memory."""
    files, found, inside = {str(path) for path in checkpoint.files}, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.split(maxsplit=5)[-1] in files
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("budget", [1, LAYER, 3 * LAYER, 2 * ALL])
def test_a_budget_changes_no_bit(checkpoint, precision, budget):
    lengths = [40] + [1] * 12
    free, tight = (
        np.concatenate(
            list(steps(NativeBackend(CONFIG, checkpoint.read, precision, resident=n), lengths))
        )
        for n in (None, budget)
    )
    assert np.array_equal(free, tight)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux tells them")
def test_memory_stays_within_the_budget_over_many_steps(tmp_path):
    checkpoint = open_checkpoint(synthesize(CONFIG, tmp_path / "random"))
    for path in checkpoint.files:  # to disk and out of the system's cache, as if memory were short
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    slack = 8 * 4 * 2 * AROUND  # both ends of each part of the experts that are held

    def most(budget):
        backend = NativeBackend(CONFIG, checkpoint.read, "fast", resident=budget)
        return max(mapped_bytes(checkpoint) for _ in steps(backend, [30] + [1] * 60 + [20]))

    assert most(LAYER) < LAYER + slack
    assert most(None) > ALL * 0.9, "the text should visit nearly all experts"


def test_loading_leaves_nothing_mapped(checkpoint):
    if sys.platform != "linux":
        pytest.skip("counts pages as Linux tells them")
    again = open_checkpoint(checkpoint.path)
    before = mapped_bytes(checkpoint)
    kept = NativeBackend(CONFIG, again.read, "fast", resident=LAYER)
    assert mapped_bytes(checkpoint) - before < 4 * AROUND and kept.ops.resident.bytes == 0


@pytest.fixture
def said(monkeypatch):
    """What is asked of the system, in order."""
    asked = []
    monkeypatch.setattr(Span, "will_need", lambda span: asked.append(("need", span.start)))
    monkeypatch.setattr(Span, "let_go", lambda span: asked.append(("go", span.start)))
    return asked


@pytest.fixture
def experts(tmp_path):
    """Four experts of 8 pages each in a mapped file."""
    path = tmp_path / "file"
    path.write_bytes(bytes(32 * mmap.PAGESIZE))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, np.uint8).reshape(4, -1)


def test_what_was_used_longest_ago_goes_first(experts, said):
    one = experts[0].nbytes
    held = Resident(3 * one)
    held.watch("matrix", experts)
    for chosen in ([[0, 1]], [[2, 0]], [[3, 3]]):
        held.use(["matrix"], np.array(chosen, np.int32))
    assert said == [("need", 0), ("need", one), ("need", 2 * one), ("need", 3 * one), ("go", one)]
    assert held.bytes == 3 * one


def test_all_is_asked_for_before_anything_goes_and_nothing_in_use_does(experts, said):
    held = Resident(1)
    for name in ("first", "second"):
        held.watch(name, experts)
    for chosen in ([0, 1], [2, 3]):
        held.use(["first", "second"], np.array([chosen], np.int32))
    assert [what for what, _ in said] == ["need"] * 8 + ["go"] * 4
    assert held.bytes == 4 * experts[0].nbytes


def test_experts_are_asked_for_before_the_first_product(checkpoint, monkeypatch, said):
    backend = NativeBackend(CONFIG, checkpoint.read, "fast", resident=LAYER)
    real = backend.ops.__class__.experts.__globals__["_core"].experts
    monkeypatch.setattr(
        "gptoss.backends.native.ops._core.experts",
        lambda *args: (said.append(("product", 0)), real(*args)),
    )
    said.clear()
    next(steps(backend, [1]))
    order = [what for what, _ in said if what != "go"]
    assert order == (["need"] * 2 * 2 * 2 + ["product"]) * 4  # experts, matrices, blocks and scales


def test_a_long_prompt_reads_every_expert_once(checkpoint, said):
    free, tight = (
        next(steps(NativeBackend(CONFIG, checkpoint.read, "fast", resident=n), [700]))
        for n in (None, 1)
    )
    needed = [what for what, _ in said].count("need")
    assert needed == 4 * 8 * 2 * 2  # layers, experts, matrices, blocks and scales
    assert np.array_equal(free, tight)


class Recorder:
    """A mapping that notes what it is advised."""

    def __init__(self, length):
        self.length, self.advice = length, []

    def __len__(self):
        return self.length

    def madvise(self, advice, start, length):
        assert start % mmap.PAGESIZE == 0 and length > 0 and start + length <= self.length
        self.advice.append((advice, start, start + length))


needs_advice = pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="no such advice here")


@needs_advice
@pytest.mark.parametrize("start, stop", [(0, 1), (5000, 5001), (4095, 3 * PIECE + 7), (9, 8 << 20)])
def test_a_range_is_read_ahead_whole_and_in_pieces(start, stop):
    mapped = Recorder(8 << 20)
    Span(mapped, start, stop).will_need()
    kinds, starts, stops = zip(*mapped.advice, strict=True)
    assert set(kinds) == {mmap.MADV_WILLNEED}
    assert starts[0] <= start and stops[-1] == stop and starts[1:] == stops[:-1]
    assert all(b - a <= PIECE for _, a, b in mapped.advice)


@needs_advice
@pytest.mark.parametrize("start, stop", [(0, 1), (500_000, 500_001), (7, 1 << 20)])
def test_letting_go_never_leaves_the_file(start, stop):
    mapped = Recorder(1 << 20)
    Span(mapped, start, stop).let_go()
    [(kind, a, b)] = mapped.advice
    assert kind == mmap.MADV_DONTNEED and a <= start and stop <= b


def test_where_there_is_no_such_advice_nothing_is_done(checkpoint, monkeypatch):
    expected = [x.tobytes() for x in steps(NativeBackend(CONFIG, checkpoint.read), [9, 1, 1])]
    for name in ("MADV_WILLNEED", "MADV_DONTNEED"):
        monkeypatch.delattr(mmap, name, raising=False)
    backend = NativeBackend(CONFIG, checkpoint.read, resident=LAYER)
    assert [x.tobytes() for x in steps(backend, [9, 1, 1])] == expected
    mapped = Recorder(100)
    Span(mapped, 0, 100).will_need(), Span(mapped, 0, 100).let_go()
    assert mapped.advice == []


def test_spans_are_where_the_bytes_are(checkpoint):
    stored = checkpoint.read("block.1.mlp.mlp2_weight")
    assert isinstance(stored, Packed)
    for part, span in zip((stored.blocks, stored.scales), spans(stored, 3, 2), strict=True):
        assert span.mapped[span.start : span.stop] == part[3:5].tobytes()


def test_memory_that_is_no_file_is_left_alone(experts, tmp_path):
    packed = encode(np.ones((4, 2, 32), np.float32))
    assert spans(packed, 0, 4) == spans(experts.copy(), 0, 4) == []
    assert spans(experts[:, ::2], 0, 1) == []  # not one stretch
    with (tmp_path / "file").open("rb") as file:
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    assert spans(np.frombuffer(private, np.uint8).reshape(4, -1), 0, 1) == []
    held = Resident(1)
    held.watch("matrix", packed)
    held.use(["matrix"], np.array([[0, 3]], np.int32))
    held.settle()
    assert held.bytes == 0


@pytest.mark.parametrize("first, count", [(-1, 1), (0, 0), (0, 5), (4, 1), (3, 2), (2, -1)])
def test_items_that_are_not_there_are_refused(experts, first, count):
    with pytest.raises(ValueError, match="of 4 are not there"):
        spans(experts, first, count)


@pytest.mark.parametrize("budget", [0, -5])
def test_no_budget_at_all_is_refused(budget):
    with pytest.raises(ValueError, match="1 byte or more"):
        resident.Resident(budget)
