"""MXFP4: decoded like the specification's own sentences, encoded so that nothing stored is lost."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptoss.model.mxfp4 import BLOCK, Packed, decode, encode

RULES = ["floor", "ceil", "least_squares"]


def scalar(nibble: int, scale: int) -> float:
    """One value as the OCP text has it: sign, two exponent bits with bias 1, one of mantissa."""
    if scale == 255:
        return float("nan")
    sign = -1.0 if nibble & 8 else 1.0
    exponent, mantissa = nibble >> 1 & 3, nibble & 1
    magnitude = 0.5 * mantissa if exponent == 0 else (1 + 0.5 * mantissa) * 2.0 ** (exponent - 1)
    return sign * magnitude * 2.0 ** (scale - 127)


def same(a: Any, b: Any) -> bool:
    """Equal, signs of zeros and places of NaNs included."""
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b))


def every_pair() -> Packed:
    """All 256 bytes under all 256 scales: [256, 16 * 32]."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
    return Packed(blocks, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_every_byte_under_every_scale_decodes_as_specified(dtype):
    wanted = np.array(
        [[scalar(n, s) for b in range(256) for n in (b & 15, b >> 4)] for s in range(256)]
    )  # low nibble first
    with np.errstate(over="ignore"):  # 6 * 2**127 is no float32
        assert same(every_pair().decode(dtype), wanted.astype(dtype))


def test_a_scale_of_255_is_not_a_number_and_touches_its_own_block_only():
    packed = Packed(np.zeros((2, 2, 16), np.uint8), np.array([[255, 127], [254, 0]], np.uint8))
    assert np.array_equal(np.isnan(packed.decode()), [[True] * 32 + [False] * 32, [False] * 64])


def released(top: int) -> Any:
    """Blocks and scales as a checkpoint may hold them, the largest scale given."""
    return st.tuples(
        arrays(np.uint8, (3, 2, 16)),
        arrays(np.uint8, (3, 2), elements=st.integers(0, top)),
    ).map(lambda pair: Packed(*pair))


@pytest.mark.parametrize("rule", RULES)
@given(packed=released(252))  # above, a 6 is no float32
def test_what_was_packed_once_keeps_its_values_under_every_rule(rule, packed):
    values = packed.decode()
    assert same(encode(values, rule).decode(), values)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0, 1, 2, 3, 127, 252, 253, 254])
def test_every_code_survives_at_the_ends_of_the_scale(rule, scale):
    top = {253: 6, 254: 4}.get(scale, 8)  # codes whose value is a float32: below 4, below 2
    codes = np.arange(32, dtype=np.uint8) % 16
    codes = np.where(codes % 8 < top, codes, codes & 8)
    packed = Packed((codes[::2] | codes[1::2] << 4)[None, None], np.array([[scale]], np.uint8))
    values = packed.decode()
    assert np.isfinite(values).all()
    assert same(encode(values, rule).decode(), values)


@pytest.mark.parametrize("rule", RULES)
def test_zeros_stay_zeros_and_keep_their_sign(rule):
    values = np.tile(np.array([0.0, -0.0], np.float32), 32)[None]
    assert same(encode(values, rule).decode(), values)


def block(*values: float) -> Any:
    """One block that starts with these."""
    x = np.zeros((1, BLOCK), np.float32)
    x[0, : len(values)] = values
    return x


def test_floor_saturates_and_ceil_does_not():
    x = block(7.9, -7.9, 1.0)
    assert encode(x, "floor").decode()[0, :3].tolist() == [6.0, -6.0, 1.0]
    assert encode(x, "ceil").decode()[0, :3].tolist() == [8.0, -8.0, 1.0]


@pytest.mark.parametrize("value", [3.0e38, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("rule", RULES)
def test_the_largest_floats_are_not_lost(rule, value):
    """What is nearest may be 2**128, which only float64 can hold."""
    assert encode(block(value, -value), rule).decode(np.float64)[0, 0] >= 0.7 * value


FLOATS = arrays(
    np.float32,
    (2, 2 * BLOCK),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def squared_error(x: Any, rule: str) -> Any:
    """Of each block."""
    error = encode(x, rule).decode(np.float64) - x
    return (error * error).reshape(*x.shape[:-1], -1, BLOCK).sum(axis=-1)


@given(x=FLOATS)
def test_ceil_never_saturates(x):
    packed = encode(x, "ceil")
    room = 6.0 * 2.0 ** (packed.scales.astype(np.float64) - 127)
    assert (np.abs(x).reshape(2, 2, BLOCK).max(axis=-1) <= room).all()


@given(x=FLOATS)
def test_every_value_goes_to_the_nearest_that_its_scale_offers(x):
    for rule in RULES:
        packed = encode(x, rule)
        unit = 2.0 ** (packed.scales.astype(np.float64) - 127)
        offered = np.array([scalar(n, 127) for n in range(16)])
        grid = unit[..., None, None] * offered  # [2, 2, 1, 16]
        values = x.astype(np.float64).reshape(2, 2, BLOCK)
        best = np.abs(values[..., None] - grid).min(axis=-1)
        found = packed.decode(np.float64).reshape(2, 2, BLOCK)
        assert np.array_equal(np.abs(found - values), best)


@given(x=FLOATS)
def test_least_squares_is_never_worse_than_the_others(x):
    least = squared_error(x, "least_squares")
    assert (least <= squared_error(x, "floor")).all()
    assert (least <= squared_error(x, "ceil")).all()


def test_least_squares_is_better_on_ordinary_weights():
    x = np.random.default_rng(0).standard_normal((64, 8 * BLOCK)).astype(np.float32)
    least, floor, ceil = (squared_error(x, r).sum() for r in ("least_squares", "floor", "ceil"))
    assert least < 0.97 * min(floor, ceil)


def test_least_squares_clips_one_value_where_that_saves_the_many():
    x = block(4.1, *[0.25] * 31)
    assert encode(x, "least_squares").decode()[0].tolist() == [3.0] + [0.25] * 31
    assert encode(x, "floor").decode()[0].tolist() == [4.0] + [0.0] * 31


def test_ties_go_to_the_even_mantissa():
    x = block(6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0)
    wanted = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -4.0]
    assert same(encode(x, "floor").decode()[0, :10], np.array(wanted, np.float32))


def test_bfloat16_is_packed_like_the_float32_it_stands_for():
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(ml_dtypes.bfloat16)
    for rule in RULES:
        a, b = encode(x, rule), encode(x.astype(np.float32), rule)
        assert np.array_equal(a.blocks, b.blocks) and np.array_equal(a.scales, b.scales)


@pytest.mark.parametrize("columns", [1, 31, 33, 2881])
def test_columns_that_are_no_whole_blocks_are_refused(columns):
    with pytest.raises(ValueError, match=f"blocks of 32, but the rows have {columns} columns"):
        encode(np.zeros((2, columns), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_refused(rule, value):
    with pytest.raises(ValueError, match="no infinity and no NaN"):
        encode(block(1.0, value), rule)


def test_indexing_a_stack_copies_nothing():
    stack = Packed(np.zeros((3, 4, 2, 16), np.uint8), np.zeros((3, 4, 2), np.uint8))
    assert stack.shape == (3, 4, 64)
    assert stack.nbytes == 3 * 4 * 2 * 17
    assert stack[1].shape == (4, 64)
    assert np.shares_memory(stack[1].blocks, stack.blocks)
    assert np.shares_memory(stack[1].scales, stack.scales)


def test_a_full_size_matrix_decodes_and_packs_again():
    """One expert's mlp1 of the released models, 5760 x 2880."""
    rng = np.random.default_rng(2)
    packed = Packed(
        rng.integers(0, 256, (5760, 90, 16), np.uint8), rng.integers(110, 130, (5760, 90), np.uint8)
    )
    values = packed.decode()
    assert values.shape == packed.shape == (5760, 2880)
    assert packed.nbytes == 5760 * 2880 * 17 // 32
    for row, column in rng.integers(0, (5760, 2880), (200, 2)).tolist():
        byte = int(packed.blocks[row, column // 32, column % 32 // 2])
        nibble = byte >> 4 if column % 2 else byte & 15
        assert values[row, column] == scalar(nibble, int(packed.scales[row, column // 32]))
    assert same(encode(values[:640], "floor").decode(), values[:640])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_decodes_the_same(dtype):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(3)
    packed = Packed(
        rng.integers(0, 256, (2, 64, 3, 16), np.uint8),
        rng.integers(1, 250, (2, 64, 3), np.uint8),  # it has neither the NaN nor infinities
    )
    theirs = convert_moe_packed_tensors(
        torch.from_numpy(packed.blocks),
        torch.from_numpy(packed.scales),
        dtype=getattr(torch, dtype),
    )
    ours = packed.decode(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    assert same(ours.swapaxes(1, 2).astype(np.float32), theirs.float().numpy())


def test_torch_has_the_same_scales():
    torch = pytest.importorskip("torch")
    scales = torch.arange(256, dtype=torch.uint8)
    theirs = scales.view(torch.float8_e8m0fnu).float().numpy()
    ones = np.full((256, 1, 16), 0x22, np.uint8)  # 1.0 and 1.0
    assert same(decode(ones, np.arange(256, dtype=np.uint8)[:, None])[:, 0], theirs)


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(ValueError, match="rule must be one of floor, ceil, least_squares, not 'x'"):
        encode(np.zeros((2, 32), np.float32), "x")
