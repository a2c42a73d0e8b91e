"""The mlx room where conformance does not look: bfloat16, roundings, shared bytes, threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx

from gptoss.backends import load_backend
from gptoss.backends.mlx import MlxBackend, backend, cache, ops
from gptoss.backends.protocol import Batch
from gptoss.errors import BackendUnavailable
from gptoss.model.mxfp4 import Packed, decode, encode
from gptoss.model.reference import NumpyOps, rope_tables
from gptoss.model.weights import random_weights
from tests.conftest import TINY

WIDE = replace(TINY, hidden_size=128, head_dim=32, intermediate_size=64, sliding_window=128)


def loaded(config, weights, dtype="float32", **how):
    return MlxBackend(config, weights.__getitem__, dtype, **how)


def logits_of(backend, tokens, steps=None):
    memory, past, parts = backend.new_cache(max_tokens=10_000), 0, []
    slot = memory.open()
    for n in steps or [len(tokens)]:
        batch = Batch.of([tokens[past : past + n]], [past], [slot], range(n))
        parts.append(backend.to_numpy(backend.forward(batch, memory)))
        past += n
    return np.concatenate(parts)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, length).tolist()


def distance(a, b):
    """Of rows of logits, as a share of their size."""
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# Numbers


def test_packed_values_are_exact_at_every_scale_and_code():
    codes = np.tile(np.arange(16, dtype=np.uint8) | np.arange(15, -1, -1, dtype=np.uint8) << 4, 253)
    packed = Packed(
        codes.reshape(1, 253, 1, 16), np.arange(253, dtype=np.uint8).reshape(1, 253, 1)
    )  # the scales above give infinities, which make NaN of the zeros they are added to here
    each = ops.PackedArray.of(packed).multiply(
        mx.eye(32)[:, None], mx.zeros(32, mx.int32), ordered=False
    )
    expected = decode(packed.blocks[0], packed.scales[0])
    np.testing.assert_array_equal(np.array(each)[:, 0].T, expected)


def test_rotations_are_right_at_the_end_of_the_context():
    """In float32, position times frequency is wrong by thousandths there."""
    far = np.array([0, 130, 4200, 131_071], np.int32)
    x = np.random.default_rng(0).standard_normal((4, 2, TINY.head_dim)).astype(np.float32)
    ours = ops.MlxOps().rope(mx.array(x), ops.rotations(far, TINY), TINY)
    cos, sin = rope_tables(far, TINY, np.float64)
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    exact = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    np.testing.assert_allclose(np.array(ours), exact, atol=1e-6)


def test_of_many_experts_the_best_come_first_and_of_equal_ones_the_lower():
    scores = np.random.default_rng(0).integers(0, 9, (300, 32)).astype(np.float32)
    chosen, share = ops.MlxOps().route(mx.array(scores), 4)
    expected = NumpyOps().route(scores, 4)
    np.testing.assert_array_equal(np.array(chosen), expected[0])
    np.testing.assert_allclose(np.array(share), expected[1], rtol=1e-6)


@pytest.mark.parametrize("experts", [1, 3])
def test_sorted_visits_are_the_same_sum(monkeypatch, experts):
    """A long prompt's visits are sorted by expert; the answer may not depend on it."""
    config = replace(TINY, experts_per_token=experts)
    weights = random_weights(config)
    weights |= {n: encode(w) for n, w in weights.items() if n.endswith("_weight")}
    answers = []
    for many in (1, 1 << 30):
        monkeypatch.setattr(ops, "MANY", many)
        answers.append(logits_of(loaded(config, weights), text(30)))
    np.testing.assert_allclose(*answers, atol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_bfloat16_is_as_good_as_in_torch(packed):
    """Past the window, prompt and single tokens."""
    weights = random_weights(WIDE, scale=0.1)
    if packed:
        weights |= {n: encode(w) for n, w in weights.items() if n.endswith("_weight")}
    tokens, steps = text(200), [150, 47, 1, 1, 1]
    rooms = {
        name: load_backend(name, WIDE, weights.get, dtype=dtype)
        for name, dtype in {"reference": "float64", "torch": "bfloat16", "mlx": "bfloat16"}.items()
    }
    truth, torchs, ours = (logits_of(room, tokens, steps) for room in rooms.values())
    assert 1e-4 < distance(ours, truth) <= 1.5 * distance(torchs, truth)


def test_rounding_comes_close_and_closer_with_more_bits():
    weights = random_weights(WIDE, scale=0.1)
    truth = logits_of(loaded(WIDE, weights), text(40))
    far = {}
    for precision in ("fast", "small"):
        ours = logits_of(loaded(WIDE, weights, precision=precision), text(40))
        # The middle one of the rows: in a few, rounding changes which expert is chosen.
        far[precision] = np.median([distance(a, b) for a, b in zip(ours, truth, strict=True)])
    assert 1e-4 < 4 * far["fast"] < far["small"] < 0.7


def test_rounded_matrices_are_the_numbers_they_stand_for(monkeypatch):
    monkeypatch.setattr(ops, "STRIP", 50)  # the last strip is shorter
    w = np.random.default_rng(0).standard_normal((130, 96)).astype(np.float32)
    for bits in (4, 8):
        rounded = ops.AffineArray.of(mx.array(w), bits)
        ours = np.array(rounded.product(mx.eye(96))).T
        step = np.ptp(w.reshape(130, 3, 32), axis=-1) / (2**bits - 1)
        error = np.abs(ours - w).reshape(130, 3, 32).max(axis=-1)
        assert np.array(rounded.product(mx.zeros((0, 96)))).shape == (0, 130)
        assert (error <= step).all()  # MLX shifts the grid so that zero lies on it


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_file_is_cast_in_pieces_to_the_same_numbers(monkeypatch, dtype):
    """Lying by columns or by rows, in one piece, several, or a row each."""
    w = np.random.default_rng(0).standard_normal((70, 48)).astype(ml_dtypes.bfloat16)
    for piece in (1 << 20, 1000, 1):
        monkeypatch.setattr(backend, "PIECE", piece)
        for across in (False, True):
            x = backend.cast(w, dtype, across=across)
            assert x.dtype == dtype and mx.array_equal(x, mx.array(w))
        vector = backend.cast(w[0], dtype)
        assert mx.array_equal(vector, mx.array(w[0]))


# Cache


def test_sliding_layers_stay_bounded_and_full_ones_grow():
    backend = loaded(replace(TINY, sliding_window=16), random_weights(TINY))
    memory = backend.new_cache(max_tokens=10_000)
    slot = memory.open()
    for past in range(0, 1000, 200):
        backend.forward(Batch.of([text(200)], [past], [slot], []), memory)
    for step in range(150):
        backend.forward(Batch.of([[1]], [1000 + step], [slot], []), memory)
    sliding, full = memory.strips[slot][0], memory.strips[slot][1]
    assert sliding.capacity <= 15 + 2 * cache.SPARE and full.capacity >= full.held == 1150
    assert memory.nbytes < 2 * (1150 * 1.25 + 600) * 2 * 2 * TINY.head_dim * 4


@pytest.mark.parametrize("length", [20, 190])  # most of the buffer given back; shared
def test_what_one_row_writes_the_row_forked_from_it_never_sees(length):
    backend = loaded(TINY, random_weights(TINY))
    memory = backend.new_cache(max_tokens=10_000)
    parent = memory.open()
    backend.forward(Batch.of([text(200)], [0], [parent]), memory)
    child = memory.fork(parent, length)
    tails = [text(5, seed=1), text(5, seed=2)]
    both = backend.forward(Batch.of(tails, [200, length], [parent, child]), memory)
    last = backend.forward(Batch.of([[3], [4]], [205, length + 5], [parent, child]), memory)
    grown, forked = text(200) + tails[0], text(200)[:length] + tails[1]
    rows = (grown, forked, [*grown, 3], [*forked, 4])
    alone = [logits_of(backend, row)[-1] for row in rows]
    ours = np.concatenate([backend.to_numpy(both), backend.to_numpy(last)])
    np.testing.assert_allclose(ours, alone, atol=1e-3)


def test_a_rewind_keeps_the_buffer_unless_most_of_it_is_unused():
    strip = cache.Strip([mx.zeros((1, 2, 0, 16))], None)
    strip.extend([mx.ones((1, 2, 400, 16))])
    assert strip.head(399).parts is strip.parts  # rejected guesses cost nothing
    assert strip.head(20).capacity == 20


@pytest.mark.parametrize("dtype, head_dim", [("float32", 32), ("bfloat16", 64)])
def test_keys_and_values_in_8_bits_take_little_and_change_little(dtype, head_dim):
    config = replace(WIDE, head_dim=head_dim, sliding_window=16)
    weights = random_weights(config, scale=0.1)
    held, answers = {}, {}
    for kv in (None, "int8"):
        backend = loaded(config, weights, dtype, kv=kv)
        memory = backend.new_cache(max_tokens=1000)
        slot = memory.open()
        batch = Batch.of([text(500)], [0], [slot], range(500))
        whole = backend.to_numpy(backend.forward(batch, memory))
        memory.truncate(slot, 495)  # then, in another row, as if nothing had followed
        child = memory.fork(slot, 490)
        backend.forward(Batch.of([text(500)[490:493]], [490], [child]), memory)
        last = Batch.of([text(500)[493:494]], [493], [child])
        np.testing.assert_allclose(
            backend.to_numpy(backend.forward(last, memory))[0], whole[493], atol=0.1
        )
        held[kv], answers[kv] = memory.nbytes, whole
    middle = [distance(a, b) for a, b in zip(answers["int8"], answers[None], strict=True)]
    assert 1e-5 < np.median(middle) < 0.1
    assert held["int8"] < held[None] * (0.7 if dtype == "bfloat16" else 0.4)


# Where it runs


def test_another_thread_may_go_on_with_a_row():
    backend = loaded(TINY, random_weights(TINY))
    memory = backend.new_cache(max_tokens=100)
    slot = memory.open()
    backend.forward(Batch.of([text(10)], [0], [slot]), memory)
    with ThreadPoolExecutor(1) as pool:
        child = pool.submit(memory.fork, slot, 9).result()
        batch = Batch.of([[3], [4]], [10, 9], [slot, child])
        logits = pool.submit(backend.forward, batch, memory).result()
    alone = [logits_of(backend, row)[-1] for row in ([*text(10), 3], [*text(9), 4])]
    np.testing.assert_allclose(backend.to_numpy(logits), alone, atol=1e-4)


def test_an_absent_gpu_is_said():
    if mx.is_available(mx.Device(mx.gpu)):
        pytest.skip("there is one")
    with pytest.raises(BackendUnavailable, match="'gpu' was asked for, but MLX finds none"):
        MlxBackend(TINY, random_weights(TINY).get, device="gpu")


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"dtype": "float64"}, "computes in float32, bfloat16, not float64"),
        ({"device": "cuda"}, "runs on cpu or gpu, not 'cuda'"),
        ({"precision": "finest"}, "one of exact, fast, small"),
        ({"kv": "float32"}, "in its dtype or in int8, not in float32"),
        ({"kv": "int8"}, "multiple of 32, not 16"),
    ],
)
def test_what_it_cannot_do_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        MlxBackend(TINY, random_weights(TINY).get, **wrong)


def test_fused_functions_are_what_they_fuse():
    """On a GPU they are compiled; a compiler on this machine shows that nothing changes."""
    x, limit = mx.random.normal((3, 8)), mx.array(7.0)
    try:
        compiled = ops._compiled(ops._activate)(x, x, limit)
        mx.eval(compiled)
    except RuntimeError as error:
        pytest.skip(f"no compiler: {error}")
    assert mx.allclose(compiled, ops._activate(x, x, limit), atol=1e-6)
    a, b = ops._compiled(ops._rotate)(x, x, x, x)
    assert mx.allclose(mx.stack([a, b]), mx.stack(ops._rotate(x, x, x, x)), atol=1e-6)
