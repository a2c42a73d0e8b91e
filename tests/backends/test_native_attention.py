"""The compiled attention against the reference, and against itself: one query, one answer."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

core = pytest.importorskip("gptoss._core", reason="gptoss was installed without a compiler")

from gptoss.backends import CACHES  # noqa: E402
from gptoss.backends.native import cache as rooms  # noqa: E402
from gptoss.backends.native.cache import PAGE, NativeCache, NativeView  # noqa: E402
from gptoss.backends.protocol import Batch  # noqa: E402
from gptoss.model.reference import attend_row  # noqa: E402
from tests.conftest import TINY  # noqa: E402

SLIDING, FULL = 0, 1  # layers
CHUNK = 4096  # keys whose result is finished before it is added to others
EXACT = 5e-6  # of the largest output
HALF = 4e-3  # the same in bfloat16: shares are rounded before they are multiplied with values
SHAPES = [
    (64, 8, 64),
    (4, 2, 32),
    (4, 4, 16),
    (8, 1, 8),
    (5, 1, 10),
    (6, 2, 18),
    (34, 2, 34),
    (2, 2, 2),
]


@pytest.fixture(autouse=True)
def undo():
    """Leave the threads and the instruction set as they were."""
    isa, threads = core.isa(), core.threads()
    yield
    core.use_isa(isa)
    core.set_threads(threads)


@pytest.fixture(params=core.isas())
def isa(request):
    core.use_isa(request.param)
    return request.param


def config(H, K, d, window=128):
    return replace(
        TINY,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=d,
        sliding_window=window,
        rope_scaling_factor=1.0,
    )


class Text:
    """Random queries, keys, values [n, heads, d] and sinks [H]."""

    def __init__(self, shape, n, seed=0, scale=2.0):
        H, K, d = self.shape = shape
        rng = np.random.default_rng(seed)
        self.q, self.k, self.v = (
            (scale * rng.standard_normal((n, heads, d))).astype(np.float32) for heads in (H, K, K)
        )
        self.sinks = rng.standard_normal(H).astype(np.float32)

    def truth(self, t, window, dtype=ml_dtypes.bfloat16):
        """The last t outputs, in float64 on keys and values as they are kept."""
        k, v = (kept(x, dtype) for x in (self.k, self.v))
        q = self.q[-t:].astype(np.float64)
        if dtype != "int8" and np.dtype(dtype).name == "bfloat16":  # as keys are multiplied with it
            by = np.float32(1.44269504) / np.sqrt(np.float32(q.shape[-1]))
            q = (self.q[-t:] * by).astype(dtype).astype(np.float64) / by
        return attend_row(q, k, v, self.sinks.astype(np.float64), window)


def kept(x, dtype):
    """[n, heads, d] in float64, as a cache keeps it."""
    if dtype != "int8":
        return x.astype(dtype).astype(np.float64)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.rint(x * (1 / scale)) * scale.astype(np.float64)


def attend(cache, layer, rows, window):
    """rows: (text, slot, past, new tokens) -> [new tokens of all rows, H, d]."""
    batch = Batch.of([[0] * t for *_, t in rows], [p for *_, p, _ in rows], [r[1] for r in rows])
    q, k, v = (
        np.concatenate([getattr(text, name)[past : past + t] for text, _, past, t in rows])
        for name in "qkv"
    )
    view = NativeView(cache, batch)
    sinks = rows[0][0].sinks
    view.attend(FULL - layer, q, k, v, sinks, 1)  # the other layer only keeps up
    return view.attend(layer, q, k, v, sinks, window)


def in_steps(text, layer, window, steps, dtype="bfloat16"):
    cache = NativeCache(config(*text.shape, window or 128), 100_000, dtype)
    slot, past, outs = cache.open(), 0, []
    for t in steps:
        outs.append(attend(cache, layer, [(text, slot, past, t)], window))
        past += t
    return np.concatenate(outs)


def remembered(text, n, dtype="bfloat16"):
    """A cache whose first slot holds the text's first n tokens, put there in little time."""
    cache = NativeCache(config(*text.shape), 1_000_000, dtype)
    slot = cache.open()
    attend(cache, FULL, [(text, slot, 0, n)], 1)
    return cache, slot


def error(ours, truth):
    return np.abs(ours - truth).max() / np.abs(truth).max()


def allowed(dtype="bfloat16"):
    return HALF if dtype == "bfloat16" else EXACT


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 128])
def test_every_shape_is_exact(isa, shape, window, dtype):
    text, layer = Text(shape, 300), FULL if window is None else SLIDING
    truth = text.truth(300, window, dtype)
    assert error(in_steps(text, layer, window, [300], dtype), truth) < allowed(dtype)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257])
def test_no_length_is_special(isa, n):
    text = Text((4, 2, 16), n)
    assert error(in_steps(text, FULL, None, [n]), text.truth(n, None)) < allowed()
    assert error(in_steps(text, SLIDING, 16, [n]), text.truth(n, 16)) < allowed()


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 70])
def test_long_pasts_are_exact(n):
    text = Text((8, 1, 64), n + 1)
    cache, slot = remembered(text, n)
    ours = attend(cache, FULL, [(text, slot, n, 1)], None)
    assert error(ours, text.truth(1, None)) < allowed()


@pytest.mark.parametrize("layer, window", [(FULL, None), (SLIDING, 100)])
@pytest.mark.parametrize("steps", [[1] * 400, [7, 128, 1, 200, 64], [399, 1], [3, 2, 1, 394]])
def test_pieces_give_the_same_bits(layer, window, steps):
    text = Text((8, 2, 18), 400)
    np.testing.assert_array_equal(
        in_steps(text, layer, window, steps).view(np.uint32),
        in_steps(text, layer, window, [400]).view(np.uint32),
    )


@pytest.mark.parametrize("shape", [(64, 8, 64), (5, 1, 10)], ids=str)
def test_a_row_gets_the_same_bits_in_any_company(shape):
    """Beside a decode, a chunk and a new row, in any slot, with any number of threads."""
    texts = [Text(shape, 700, seed) for seed in range(4)]
    rows = [(600, 1), (130, 40), (0, 33), (699, 1)]
    alone = []
    for text, (past, t) in zip(texts, rows, strict=True):
        text.sinks = texts[0].sinks
        cache, slot = remembered(text, past) if past else remembered(text, 1)
        cache.truncate(slot, past)
        alone.append(attend(cache, FULL, [(text, slot, past, t)], None))
    for threads, order in ((1, [0, 1, 2, 3]), (2, [3, 1, 0, 2]), (3, [2, 3, 1, 0])):
        core.set_threads(threads)
        cache, batch = NativeCache(config(*shape), 100_000), []
        for r in order:
            slot, (past, t) = cache.open(), rows[r]
            if past:
                attend(cache, FULL, [(texts[r], slot, 0, past)], 1)
            batch.append((texts[r], slot, past, t))
        together = attend(cache, FULL, batch, None)
        np.testing.assert_array_equal(together, np.concatenate([alone[r] for r in order]))


def test_a_long_past_gives_the_same_bits_however_it_is_shared_out():
    n = 2 * CHUNK + 100
    text, seen = Text((16, 2, 32), n + 40), {}
    for threads, t in ((1, 1), (2, 1), (3, 2), (2, 8), (2, 9), (3, 40)):
        core.set_threads(threads)
        cache, slot = remembered(text, n)
        seen[threads, t] = attend(cache, FULL, [(text, slot, n, t)], None)[0].tobytes()
    assert len(set(seen.values())) == 1


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer, window", [(FULL, None), (SLIDING, 50)])
def test_every_instruction_set_gives_the_same_bits(shape, layer, window, dtype):
    text, seen = Text(shape, 200), {}
    text.k[20] *= np.float32(2.0**-140)  # a token whose keys have hardly a scale
    for name in core.isas():
        core.use_isa(name)
        seen[name] = in_steps(text, layer, window, [150, 1, 2, 47], dtype).tobytes()
    assert len(set(seen.values())) == 1, f"{list(seen)} differ"


@pytest.mark.parametrize("dtype", CACHES)
def test_what_lies_in_unwritten_memory_does_not_matter(isa, dtype, monkeypatch):
    class Dirty(rooms.Page):
        def __init__(self, size):
            super().__init__(size)
            self.data[:] = 0xFF  # NaN, and a scale of NaN, in every format

    monkeypatch.setattr(rooms, "Page", Dirty)
    text = Text((4, 2, 10), 150)
    for layer, window in ((FULL, None), (SLIDING, 20)):
        ours = in_steps(text, layer, window, [1, 2, 140, 7], dtype)
        assert error(ours, text.truth(150, window, dtype)) < allowed(dtype)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_row(isa, dtype, name, what):
    text, broken = Text((4, 2, 16), 40), Text((4, 2, 16), 40)
    getattr(broken, name)[11] = what
    cache = NativeCache(config(4, 2, 16), 1000, dtype)
    rows = [(x, cache.open(), 0, 40) for x in (broken, text)]
    ours = attend(cache, FULL, rows, None)
    assert not np.isfinite(ours[11:40]).any() and np.isfinite(ours[:11]).all()
    np.testing.assert_array_equal(ours[40:], in_steps(text, FULL, None, [40], dtype))


@pytest.mark.parametrize("sink", [-np.inf, -1e4, 0.0, 80.0, 1e4])
@pytest.mark.parametrize("scale", [0.0, 1.0, 60.0])  # scores of 0, of a few, of thousands
def test_no_score_overflows(isa, sink, scale):
    text = Text((4, 2, 16), 200, scale=scale)
    text.v = Text((4, 2, 16), 200).v
    text.sinks[:] = sink
    with np.errstate(under="ignore"):
        truth = text.truth(200, None)
    ours = in_steps(text, FULL, None, [200])
    # A score of thousands is itself known to a thousandth only.
    assert np.abs(ours - truth).max() <= (2e-2 if scale > 1 else allowed()) * max(
        np.abs(truth).max(), 1e-30
    )


def test_slices_of_a_fused_projection_are_taken_as_they_are():
    H, K, d, T = 8, 2, 16, 50
    text = Text((H, K, d), T)
    qkv = np.concatenate([x.reshape(T, -1) for x in (text.q, text.k, text.v)], axis=1)
    fused = Text((H, K, d), T)
    fused.q = qkv[:, : H * d].reshape(T, H, d)
    fused.k = qkv[:, H * d : (H + K) * d].reshape(T, K, d)
    fused.v = qkv[:, (H + K) * d :].reshape(T, K, d)
    assert not fused.k.flags.c_contiguous
    cache = NativeCache(config(H, K, d), 1000)
    view = NativeView(cache, Batch.of([[0] * T], [0], [cache.open()]))
    ours = view.attend(FULL, fused.q, fused.k, fused.v, text.sinks, None)
    np.testing.assert_array_equal(ours, in_steps(text, FULL, None, [T]))


def test_numbers_are_rounded_to_bfloat16_as_ml_dtypes_does(isa):
    K, d, n = 8, 64, 2048  # a million random bit patterns
    bits = np.random.default_rng(0).integers(0, 1 << 32, (n, K, d), np.uint32)
    edges = [
        0x7F800000,
        0x7F800001,
        0xFFC00000,
        1,
        0x80000001,
        0x7FFF,
        0x8000,
        0x7F7FFFFF,
        0x3F808000,
    ]
    bits[0, 0, : len(edges)] = edges
    text = Text((K, K, d), n)
    text.k = bits.view(np.float32)
    text.v = np.roll(text.k, 1, axis=0)
    cache, slot = remembered(text, n)
    pages = cache.strips[slot][FULL].pages
    data = np.stack([pages[i].data.view(np.uint16).reshape(K, -1) for i in range(n // PAGE)])
    k = data[..., : PAGE * d].reshape(-1, K, PAGE // 16, d // 2, 16, 2)
    k = k.transpose(0, 2, 4, 1, 3, 5)
    v = data[..., PAGE * d :].reshape(-1, K, PAGE // 2, d, 2).transpose(0, 2, 4, 1, 3)
    for ours, given in ((k, text.k), (v, text.v)):
        ours, nan = ours.reshape(n, K, d), np.isnan(given)
        with np.errstate(invalid="ignore"):
            rounded = given.astype(ml_dtypes.bfloat16).view(np.uint16)
            rounded[np.abs(given) < 2.0**-50] &= 0x8000
        np.testing.assert_array_equal(ours[~nan], rounded[~nan])
        assert np.isnan(ours[nan].view(ml_dtypes.bfloat16).astype(np.float32)).all()


def test_wrong_arguments_are_refused_by_name():
    H, K, d, T = 4, 2, 16, 3
    cache = NativeCache(config(H, K, d), 1000)
    strip = cache.strips[cache.open()][FULL]
    strip.extend(T)
    good = {
        "q": np.zeros((T, H, d), np.float32),
        "k": np.zeros((T, K, d), np.float32),
        "v": np.zeros((T, K, d), np.float32),
        "sinks": np.zeros(H, np.float32),
        "out": np.zeros((T, H, d), np.float32),
        "starts": np.array([0, T], np.int32),
        "past": np.array([0], np.int32),
        "tables": [strip.table],
        "window": 0,
        "kept": "bfloat16",
    }
    core.attend(**good)
    for name, wrong, message in [
        ("k", np.zeros((T, 3, d), np.float32), "do not share 3 key heads"),
        ("v", np.zeros((T + 1, K, d), np.float32), r"v must be \[3, 2, 16\], not \[4, 2, 16\]"),
        ("q", np.zeros((T, d, H), np.float32).transpose(0, 2, 1), "q: the heads of a token"),
        ("out", np.zeros((T, H, d + 1), np.float32), "out must be"),
        ("sinks", np.zeros(H + 1, np.float32), "sinks must be"),
        ("window", -1, "window must be"),
        ("past", np.array([126], np.int32), "row 0 lacks page 1"),
        ("past", np.array([-1], np.int32), "negative past"),
        ("starts", np.array([0, T + 1], np.int32), "the same rows"),
        ("tables", [], "the same rows"),
        ("tables", [np.zeros(4, np.uint64)], "row 0 lacks page 0"),
        ("kept", "int4", "not int4"),
    ]:
        with pytest.raises(ValueError, match=message):
            core.attend(**good | {name: wrong})
    with pytest.raises(TypeError):
        core.attend(**good | {"q": good["q"].astype(np.float64)})
