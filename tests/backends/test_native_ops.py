"""The compiled operations against the NumPy reference, for every instruction set here."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from gptoss.model import mxfp4
from gptoss.model.config import nano
from gptoss.model.reference import NumpyOps, swiglu
from gptoss.model.weights import Mixture

_core = pytest.importorskip("gptoss._core", reason="the compiled core is not built")
from gptoss.backends.native.ops import NativeOps, weight, widened  # noqa: E402

ISAS = _core.isas()
FORMATS = ("float32", "bfloat16", "mxfp4")
SHAPES = [(1, 32), (7, 96), (50, 160), (130, 2880), (33, 4096)]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(ISAS[0])


def stored(rng, shape, format, scale=0.5):
    """Random weights as a checkpoint holds them, and what they stand for in float64."""
    x = rng.standard_normal(shape).astype(np.float32) * np.float32(scale)
    if format == "mxfp4":
        packed = mxfp4.encode(x)
        return packed, packed.decode("float64")
    x = x.astype(ml_dtypes.bfloat16 if format == "bfloat16" else np.float32)
    return x, x.astype(np.float64)


def product(x, w, bias=None):
    return NativeOps().linear(x, w, bias)


def error(ours, truth):
    return np.abs(ours - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("T", [1, 3, 4, 5, 23])
def test_exact_products(format, rows, columns, T):
    rng = np.random.default_rng(rows + columns + T)
    w, truth = stored(rng, (rows, columns), format)
    x = rng.standard_normal((T, columns)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    assert error(product(x, weight(w), bias), x.astype(np.float64) @ truth.T + bias) < 2e-6


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 96), (50, 160), (40, 2880), (9, 6144)])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 9])
def test_twelve_bits_lose_nothing(rows, columns, T):
    rng = np.random.default_rng(rows + T)
    w = (rng.standard_normal((rows, columns)) * 0.02).astype(ml_dtypes.bfloat16)
    odd = rng.integers(0, w.size, w.size // 400 + 1)  # of these blocks none fits
    w.reshape(-1)[odd] = rng.integers(0, 1 << 15, len(odd)).astype(np.uint16).view(w.dtype)
    w[np.isnan(w.astype(np.float32))] = 0
    x = rng.standard_normal((T, columns)).astype(np.float32)
    packed = weight(w)
    done = packed.use_twelve()
    assert done or rows == 1
    np.testing.assert_array_equal(product(x, packed), product(x, weight(w)))
    if done:
        with pytest.raises(ValueError, match="twelve bits"):
            packed.use_bytes()


def test_what_would_not_become_smaller_stays():
    rng = np.random.default_rng(0)
    everything = rng.integers(0, 1 << 16, (64, 320)).astype(np.uint16).view(ml_dtypes.bfloat16)
    for w in (everything, everything.astype(np.float32), np.zeros((2, 33), everything.dtype)):
        assert not weight(w).use_twelve()


@pytest.mark.parametrize("format", FORMATS[:2])
@pytest.mark.parametrize("columns", [1, 31, 33, 72, 127])
def test_rows_that_are_no_whole_blocks(format, columns):
    rng = np.random.default_rng(columns)
    w, truth = stored(rng, (19, columns), format)
    x = rng.standard_normal((6, columns)).astype(np.float32)
    assert error(product(x, weight(w)), x.astype(np.float64) @ truth.T) < 2e-6
    rounded = weight(w)
    rounded.use_bytes()
    assert error(product(x, rounded), x.astype(np.float64) @ truth.T) < 2e-2


def fast_truth(x, w, format):
    """What 8-bit products stand for: both sides rounded by blocks of 32, in float64."""
    pad = -x.shape[1] % 32

    def rounded(a, up):
        blocks = np.pad(a.astype(np.float32), ((0, 0), (0, pad))).reshape(len(a), -1, 32)
        scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        if up:  # to bfloat16, upwards
            scale = ((scale.view(np.uint32) + 0xFFFF) & 0xFFFF0000).view(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        return (np.rint(blocks * inverse) * scale.astype(np.float64)).reshape(len(a), -1)

    w = np.pad(w, ((0, 0), (0, pad))) if format == "mxfp4" else rounded(w, True)
    return rounded(x, False) @ w.T


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("T", [1, 3, 4, 5, 23])
def test_fast_products(format, rows, columns, T):
    rng = np.random.default_rng(rows + columns + T)
    w, numbers = stored(rng, (rows, columns), format)
    x = rng.standard_normal((T, columns)).astype(np.float32)
    fast = weight(w)
    fast.use_bytes(1)
    assert error(product(x, fast), fast_truth(x, numbers, format)) < 1e-3  # a tie rounded otherwise
    assert error(product(x, fast), x.astype(np.float64) @ numbers.T) < 2e-2


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("T", [1, 3, 4, 5, 23])
def test_mxfp4_by_two_bytes_is_nearly_exact(rows, columns, T):
    rng = np.random.default_rng(rows + columns + T)
    w, numbers = stored(rng, (rows, columns), "mxfp4")
    x = rng.standard_normal((T, columns)).astype(np.float32)
    exact = weight(w)
    exact.use_bytes(2)
    assert error(product(x, exact), x.astype(np.float64) @ numbers.T) < 1e-4


@pytest.mark.parametrize("e", [60, 66, 67, 187, 188, 194])
def test_extreme_scales_are_multiplied_as_they_are(e):
    """Those that exponents can be added to, and those just beyond; of activations too."""
    rng = np.random.default_rng(e)
    w, _ = stored(rng, (20, 64), "mxfp4")
    w.scales[:] = e
    for size in (2.0**-62, 2.0**-50, 1.0, 2.0**50):
        x = (rng.standard_normal((6, 64)) * size).astype(np.float32)
        for planes in (1, 2):
            fast = weight(w)
            fast.use_bytes(planes)
            truth = x.astype(np.float64) @ w.decode("float64").T
            assert error(product(x, fast), truth) < 2e-2
            assert np.array_equal(product(x[:1], fast), product(x, fast)[:1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_row(format, planes, odd):
    rng = np.random.default_rng(5)
    w = weight(stored(rng, (40, 96), format)[0])
    w.use_bytes(planes)
    x = rng.standard_normal((7, 96)).astype(np.float32)
    truth = product(x, w)
    x[3, 50] = odd
    ours = product(x, w)
    assert np.isnan(ours[3]).all() and np.isnan(product(x[3:4], w)).all()
    assert np.array_equal(np.delete(ours, 3, 0), np.delete(truth, 3, 0))


@pytest.mark.parametrize("planes", [1, 2])
def test_what_is_too_small_for_a_scale_is_nothing(planes):
    rng = np.random.default_rng(6)
    w = weight(stored(rng, (40, 96), "mxfp4")[0])
    w.use_bytes(planes)
    x = rng.standard_normal((7, 96)).astype(np.float32)
    x[:, 32:64] = 0
    truth = product(x, w)
    x[:, 32:64] = rng.standard_normal((7, 32)) * 2.0**-140
    assert np.array_equal(product(x, w), truth)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("planes", [0, 1, 2])
def test_a_token_gets_the_same_bits_alone_and_in_company(format, planes):
    rng = np.random.default_rng(3)
    w, _ = stored(rng, (150, 352), format)
    x = rng.standard_normal((37, 352)).astype(np.float32)
    w = weight(w)
    if planes:
        w.use_bytes(planes)
    whole = product(x, w)
    for some in ([0], [5, 6], [36, 0, 7], list(range(11, 30))):
        assert np.array_equal(product(np.ascontiguousarray(x[some]), w), whole[some])


@pytest.mark.parametrize("planes", [0, 1, 2])
def test_all_instruction_sets_and_thread_counts_give_the_same_bits(isa, planes):
    rng = np.random.default_rng(4)
    w, _ = stored(rng, (70, 2880), "mxfp4")
    d, _ = stored(rng, (70, 2880), "bfloat16")
    x = rng.standard_normal((9, 2880)).astype(np.float32)
    results = []
    for name, threads in (("scalar", 1), (isa, 1), (isa, 3)):
        _core.use_isa(name)
        _core.set_threads(threads)
        for each in (w, d):
            each = weight(each)
            if planes:
                each.use_bytes(planes)
            results.append(product(x, each))
    _core.set_threads(_core.usable_cores())
    for first, other in zip(results[:2] * 2, results[2:], strict=True):
        assert np.array_equal(first, other)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("planes", [0, 1, 2])
@pytest.mark.parametrize("T", [1, 2, 40])
def test_experts(format, planes, T):
    E, D, F, k = 6, 96, 64, 3
    rng = np.random.default_rng(T)
    (mlp1, one), (mlp2, two) = (
        stored(rng, shape, format, 0.3) for shape in ((E, 2 * F, D), (E, D, F))
    )
    bias1, bias2 = (rng.standard_normal((E, n)).astype(np.float32) for n in (2 * F, D))
    x = rng.standard_normal((T, D)).astype(np.float32)
    chosen = np.argsort(rng.random((T, E)), axis=1)[:, :k].astype(np.int32)
    chosen[chosen == 4] = 5  # an expert nobody visits; one visited twice by the same token
    share = rng.random((T, k)).astype(np.float32)
    tree = {"norm": None, "gate": None, "gate_bias": None}
    truth = NumpyOps().experts(
        x.astype(np.float64),
        Mixture(**tree, mlp1=one, mlp1_bias=bias1, mlp2=two, mlp2_bias=bias2),
        chosen,
        share,
        nano(),
    )
    ours = Mixture(**tree, mlp1=weight(mlp1), mlp1_bias=bias1, mlp2=weight(mlp2), mlp2_bias=bias2)
    if planes:
        ours.mlp1.use_bytes(planes)
        ours.mlp2.use_bytes(planes)
    out = NativeOps().experts(x, ours, chosen, share, nano())
    exact = 1e-4 if format == "mxfp4" and planes == 2 else 2e-2
    assert error(out, truth) < (exact if planes else 3e-6)
    alone = NativeOps().experts(x[:1], ours, chosen[:1], share[:1], nano())
    assert np.array_equal(alone, out[:1])


@pytest.mark.parametrize("columns", [1, 15, 16, 2880])
def test_rms_norm(columns):
    rng = np.random.default_rng(columns)
    x, scale = (rng.standard_normal(s).astype(np.float32) for s in ((5, columns), columns))
    truth = NumpyOps().rms_norm(x.astype(np.float64), scale, 1e-5)
    assert error(NativeOps().rms_norm(x, scale, 1e-5), truth) < 1e-6


@pytest.mark.parametrize("d", [2, 10, 32, 64])
def test_rope_of_a_view(d):
    rng = np.random.default_rng(d)
    qkv = rng.standard_normal((7, 5 * d)).astype(np.float32)
    x = qkv[:, d : 4 * d].reshape(7, 3, d)
    positions = np.array([0, 1, 2, 700, 701, 2000, 2047], np.int32)
    config = dataclasses.replace(nano(), head_dim=d, rope_scaling_factor=1.0)
    truth = NumpyOps().rope(x.astype(np.float64), positions, config)
    assert error(NativeOps().rope(x, positions, config), truth) < 1e-6


def test_route_takes_the_first_of_equals():
    scores = np.array([[1, 3, 3, 2], [0, 0, 0, 0]], np.float32)
    chosen, share = NativeOps().route(scores, 2)
    assert chosen.tolist() == [[1, 2], [0, 1]] and chosen.dtype == np.int32
    assert np.allclose(share, 0.5)


def test_swiglu_over_the_whole_range():
    """Through one expert that only passes its input on."""
    F = 64
    gate = np.concatenate([np.linspace(-120, 120, F - 4), [0, -0.0, 1e-30, -88.5]]).astype(
        np.float32
    )
    up = np.linspace(-12, 12, F).astype(np.float32)
    x = np.stack([gate, up], axis=1).reshape(1, 2 * F)
    mlp1 = np.eye(2 * F, dtype=np.float32)[None]
    mlp2 = np.tile(np.eye(F, dtype=np.float32), (2, 1))[None]  # [1, 2F, F]
    zero1, zero2 = np.zeros((1, 2 * F), np.float32), np.zeros((1, 2 * F), np.float32)
    tree = {"norm": None, "gate": None, "gate_bias": None}
    w = Mixture(**tree, mlp1=weight(mlp1), mlp1_bias=zero1, mlp2=weight(mlp2), mlp2_bias=zero2)
    one = np.ones((1, 1), np.float32)
    out = NativeOps().experts(x, w, np.zeros((1, 1), np.int32), one, nano())
    truth = swiglu(x.astype(np.float64), 7.0)
    assert np.abs(out[0, :F] - truth[0]).max() < 2e-5


def test_dense_experts_in_bytes_are_whole_tiles():
    D, F = 40, 12  # 2F and D are no multiples of 16: an expert would begin inside a tile
    w1, w2 = (weight(np.zeros(s, np.float32)) for s in ((2, 2 * F, D), (2, D, F)))
    x, share, chosen = (np.zeros((1, n), np.float32) for n in (D, 1, 1))
    zeros = [np.zeros((2, n), np.float32) for n in (2 * F, D)]
    args = (x, w1, zeros[0], w2, zeros[1], chosen.astype(np.int32), share, 7.0, np.empty_like(x))
    _core.experts(*args)
    w1.use_bytes()
    with pytest.raises(ValueError, match="multiples of 16"):
        _core.experts(*args)


def test_widened_is_the_same_number():
    x = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    assert np.array_equal(widened(x), x.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("byte", [0, 1, 2, 127, 249])
def test_every_scale_of_mxfp4(byte):
    blocks = np.arange(16, dtype=np.uint8).repeat(2).reshape(1, 2, 16) * 17
    packed = mxfp4.Packed(blocks.repeat(5, 0), np.full((5, 2), byte, np.uint8))
    x = np.ones((1, 64), np.float32)
    x[0, ::3] = 0.25
    ours = product(x, weight(packed))
    truth = x.astype(np.float64) @ packed.decode("float64").T
    assert np.allclose(ours, truth, rtol=1e-6, atol=0)


def test_a_scale_of_255_is_no_number():
    packed = mxfp4.Packed(np.full((1, 1, 16), 0x22, np.uint8), np.full((1, 1), 255, np.uint8))
    assert not np.isfinite(product(np.ones((1, 32), np.float32), weight(packed))).any()


@pytest.mark.parametrize(
    "call",
    [
        lambda w: product(np.zeros((1, 5), np.float32), w),
        lambda w: product(np.zeros((1, 32), np.float32), w, np.zeros(3, np.float32)),
        lambda w: _core.Weight(np.zeros(10, np.uint8), None, 1, 32, "bfloat16"),
        lambda w: _core.Weight(np.zeros(16, np.uint8), np.zeros(2, np.uint8), 1, 32, "mxfp4"),
        lambda w: _core.Weight(np.zeros(16, np.uint8), None, 1, 32, "int3"),
        lambda w: _core.use_isa("altivec"),
        lambda w: _core.set_threads(0),
        lambda w: w.use_bytes(3),
        lambda w: [w.use_bytes(), w.use_bytes()],
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError):
        call(weight(np.zeros((4, 32), np.float32)))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("width", [1, 16, 33])
def test_gather_is_indexing(dtype, width):
    table = np.random.default_rng(0).standard_normal((9, width)).astype(dtype)
    for rows in ([], [8], [3, 0, 3, 8, 1]):
        found = NativeOps().gather(table, np.array(rows, np.int32))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, table[rows].astype(np.float32))


def test_gather_refuses_what_is_not_there():
    table, out = np.zeros((3, 4), np.float32), np.empty((1, 4), np.float32)
    for row in (3, -1):
        with pytest.raises(ValueError, match="a row that is not there"):
            _core.gather(table, np.array([row], np.int32), out)
    with pytest.raises(ValueError, match="table"):
        _core.gather(table[:, :3].copy(), np.array([0], np.int32), out)
    with pytest.raises(ValueError, match="bfloat16"):
        _core.gather(table.astype(np.float64), np.array([0], np.int32), out)
