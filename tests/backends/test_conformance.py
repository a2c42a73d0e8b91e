"""One suite for every room: same weights, same batches, same numbers as the reference."""

from dataclasses import replace
from functools import cache as once

import ml_dtypes
import numpy as np
import pytest

from gptoss.backends import NAMES, NARROW, load_backend
from gptoss.backends.protocol import Batch, Sampling
from gptoss.errors import BackendUnavailable, CacheFull, CacheMiss, ContextExceeded
from gptoss.model.mxfp4 import encode
from gptoss.model.weights import random_weights
from tests.conftest import TINY

FLOAT32 = dict.fromkeys(("torch", "mlx"), "float32")  # who computes in something else unless asked
OTHERS = [name for name in NAMES if name != "reference"]
ALLOWED = 10.0  # times float32's own rounding, measured against float64
SAME = 1e-4  # of the largest logit: what other orders of the same float32 sums may grow into
WIDE = replace(  # every expert is visited, so that no near tie between them can turn over
    TINY, num_hidden_layers=2, hidden_size=NARROW, intermediate_size=64, experts_per_token=4
)
LONG = replace(TINY, num_hidden_layers=2, sliding_window=128)


@pytest.fixture(params=NAMES)
def room(request):
    return request.param


def load(room, config, weights):
    try:
        if room == "native":
            from gptoss.backends.native import NativeBackend

            return NativeBackend(config, weights.__getitem__, "exact", kv="float32")
        return load_backend(room, config, weights.__getitem__, dtype=FLOAT32.get(room))
    except BackendUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def backend(room, tiny, weights):
    return load(room, tiny, weights)


def host(x):
    """A room's array in float64 on the host."""
    return np.asarray(x.double().cpu() if hasattr(x, "double") else x, np.float64)


def trace_of(backend, rows):
    seen = {}
    cache = backend.new_cache(max_tokens=10_000)
    slots = [cache.open() for _ in rows]
    batch = Batch.of(rows, [0] * len(rows), slots, range(sum(map(len, rows))))
    backend.forward(batch, cache, lambda name, x: seen.__setitem__(name, host(x)))
    return seen


def logits_of(backend, tokens, steps, cache=None):
    """[T, V] of one row that arrives ``steps`` tokens at a time."""
    assert sum(steps) == len(tokens)
    cache = cache or backend.new_cache(max_tokens=10_000)
    slot, past, parts = cache.open(), 0, []
    for n in steps:
        batch = Batch.of([tokens[past : past + n]], [past], [slot], range(n))
        parts.append(backend.to_numpy(backend.forward(batch, cache)))
        past += n
    return np.concatenate(parts)


def close(ours, truth, allowed=SAME):
    np.testing.assert_allclose(ours, truth, rtol=0, atol=allowed * np.abs(truth).max())


def text(length, config=TINY, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()


@pytest.mark.parametrize("room", OTHERS)  # the reference is what is measured with
def test_every_traced_value_is_as_good_as_float32_can_be(room, backend, tiny, weights, weights64):
    rows = [text(30), [7], [3, 1, 4, 1, 5]]
    truth = trace_of(load_backend("reference", tiny, weights64.get, dtype="float64"), rows)
    floor = trace_of(load_backend("reference", tiny, weights.get), rows)
    ours = trace_of(backend, rows)
    assert list(ours) == list(truth), "a room may not skip or reorder trace points"
    for name, true in truth.items():
        assert ours[name].shape == true.shape, f"{room} has another shape at {name}"
        noise, error = (np.abs(x[name] - true).max() for x in (floor, ours))
        yardstick = max(noise, np.finfo(np.float32).eps * np.abs(true).max())
        allowed = ALLOWED * yardstick
        assert error <= allowed, f"{room} first diverges at {name}: {error:.1e} > {allowed:.1e}"


def hundreds(length):
    """``length`` cut into steps of a hundred."""
    return [min(100, length - past) for past in range(0, length, 100)]


@once
def long_truth(length):
    """Logits of a text in float64, and float32's own error on it; a hundred tokens at a time."""
    tokens = text(length, LONG)
    steps = hundreds(length)  # slow on purpose: all scores of a long text would not fit
    exact, floor = (
        logits_of(
            load_backend("reference", LONG, random_weights(LONG, dtype=dtype).get, dtype=dtype),
            tokens,
            steps,
        )
        for dtype in ("float64", "float32")
    )
    return exact, np.abs(floor - exact).max()


@pytest.mark.parametrize("room", OTHERS)
@pytest.mark.parametrize("length", [130, 600, 4200])
def test_long_texts_keep_their_precision(room, length):
    """Past the window of 128 and past the 4,096 tokens where YaRN's stretching begins."""
    truth, noise = long_truth(length)
    tokens, weights = text(length, LONG), random_weights(LONG)
    for steps in ([length], [length - 3, 1, 1, 1]):
        error = np.abs(logits_of(load(room, LONG, weights), tokens, steps) - truth).max()
        allowed = ALLOWED * max(noise, np.finfo(np.float32).eps * np.abs(truth).max())
        assert error <= allowed, f"{room} at {length} tokens: {error:.1e} > {allowed:.1e}"


@pytest.mark.parametrize("steps", [[11, 26, 1], [1, 36, 1], [7, 1, 8, 1, 9, 12], [1] * 38])
def test_a_text_may_arrive_in_pieces(backend, steps):
    close(logits_of(backend, text(38), steps), logits_of(backend, text(38), [38]))


def test_rows_of_one_step_do_not_see_each_other(backend):
    """A decode, a chunk and two new rows in one step, each equal to the same row alone."""
    rows = [text(20, seed=1), text(31, seed=2), text(5, seed=3), text(1, seed=4)]
    past, cache = [19, 9, 0, 0], backend.new_cache(max_tokens=100)
    slots = [cache.open() for _ in rows]
    for row, n, slot in zip(rows, past, slots, strict=True):
        if n:
            backend.forward(Batch.of([row[:n]], [0], [slot]), cache)
    new = [row[n:] for row, n in zip(rows, past, strict=True)]
    together = backend.to_numpy(backend.forward(Batch.of(new, past, slots), cache))
    alone = [logits_of(backend, row, [len(row)])[-1] for row in rows]
    close(together, np.stack(alone))


def test_the_same_prompt_in_every_slot_gives_the_same_answer(backend):
    """No slot leaks into another, neither beside it nor after it."""
    cache = backend.new_cache(max_tokens=1000)
    first = logits_of(backend, text(20), [20], cache)[-1]
    noise = cache.open()
    backend.forward(Batch.of([text(50, seed=9)], [0], [noise]), cache)
    cache.close(noise)
    slots = [cache.open() for _ in range(8)]
    batch = Batch.of([text(19) for _ in slots], [0] * 8, slots)
    backend.forward(batch, cache)
    last = Batch.of([text(20)[19:] for _ in slots], [19] * 8, slots)
    answers = backend.to_numpy(backend.forward(last, cache))
    close(answers, np.stack([first] * 8))
    assert len(set(answers.argmax(axis=1))) == 1


def test_only_wanted_logits_come_back_and_in_that_order(backend):
    cache = backend.new_cache(max_tokens=100)
    every = logits_of(backend, text(12), [12], cache)
    for wanted in ([11], [3, 3, 0], []):
        batch = Batch.of([text(12)], [0], [cache.open()], wanted)
        some = backend.to_numpy(backend.forward(batch, cache))
        assert some.shape == (len(wanted), TINY.vocab_size)
        assert some.dtype == np.float32
        if wanted:
            close(some, every[wanted])


def test_who_traces_gets_the_same_logits_and_nobody_may_want_any(backend):
    """Behind the last attention only wanted tokens are computed, unless all are looked at."""
    cache, rows = backend.new_cache(max_tokens=100), [text(20, seed=1), text(9, seed=2)]
    slots, past, seen = [cache.open() for _ in rows], [0, 0], []
    batch = Batch.of([row[:-1] for row in rows], past, slots, [])
    assert backend.to_numpy(backend.forward(batch, cache)).shape[0] == 0
    last = Batch.of([row[-1:] for row in rows], [len(row) - 1 for row in rows], slots, [1])
    ours = backend.to_numpy(backend.forward(last, cache))
    for slot, row in zip(slots, rows, strict=True):
        cache.truncate(slot, len(row) - 1)
    traced = backend.forward(last, cache, lambda name, x: seen.append((name, len(x))))
    close(ours, backend.to_numpy(traced))
    close(ours, logits_of(backend, rows[1], [9])[-1:])
    assert dict(seen)["block.1.mlp.out"] == 2 and dict(seen)["norm"] == 1


def test_a_rewound_row_continues_as_if_nothing_had_followed(backend):
    cache = backend.new_cache(max_tokens=1000)
    slot = cache.open()
    backend.forward(Batch.of([text(30)], [0], [slot]), cache)
    for length in (27, 26, 0):
        cache.truncate(slot, length)
        tail = [5, 6, 7]
        ours = backend.to_numpy(backend.forward(Batch.of([tail], [length], [slot]), cache))
        whole = text(30)[:length] + tail
        close(ours, logits_of(backend, whole, [len(whole)])[-1:])


def test_a_fork_shares_the_prefix_and_nothing_else(backend):
    cache = backend.new_cache(max_tokens=1000)
    parent = cache.open()
    backend.forward(Batch.of([text(20)], [0], [parent]), cache)
    child = cache.fork(parent, 18)
    rows = [text(4, seed=1), text(4, seed=2)]
    both = backend.forward(Batch.of(rows, [20, 18], [parent, child]), cache)
    cache.close(parent)
    after = backend.forward(Batch.of([[9]], [22], [child]), cache)
    grown, forked = text(20) + rows[0], text(18) + rows[1]
    alone = [logits_of(backend, row, [len(row)])[-1] for row in (grown, forked, [*forked, 9])]
    close(np.concatenate([backend.to_numpy(both), backend.to_numpy(after)]), np.stack(alone))


def test_a_full_cache_says_so_and_changes_nothing(backend):
    cache = backend.new_cache(max_tokens=20)
    slot, other = cache.open(), cache.open()
    cache.reserve(slot, 12)
    backend.forward(Batch.of([text(12)], [0], [slot]), cache)
    for refused in (
        lambda: cache.reserve(other, 9),
        lambda: cache.reserve(slot, 21),
        lambda: cache.fork(slot, 9),
    ):
        with pytest.raises(CacheFull):
            refused()
    cache.reserve(other, 8)  # had anything been taken, this would not fit
    more = backend.to_numpy(backend.forward(Batch.of([[3]], [12], [slot]), cache))
    close(more, logits_of(backend, [*text(12), 3], [13])[-1:])
    cache.close(other)
    cache.reserve(cache.fork(slot, 4), 8)


def test_a_rewind_is_right_or_refused(backend):
    """A room may forget what slid out of the window, but it may not guess."""
    cache = backend.new_cache(max_tokens=10_000)
    slot = cache.open()
    for past in range(0, 1000, 100):
        row = text(1000)[past : past + 100]
        backend.forward(Batch.of([row], [past], [slot]), cache)
    for length in (500, 20):
        try:
            child = cache.fork(slot, length)
        except CacheMiss:
            with pytest.raises(CacheMiss):
                cache.truncate(slot, length)
            continue
        ours = backend.to_numpy(backend.forward(Batch.of([[3]], [length], [child]), cache))
        whole = [*text(1000)[:length], 3]
        close(ours, logits_of(backend, whole, [len(whole)])[-1:])
    whole = [*text(1000), 3]
    ours = backend.to_numpy(backend.forward(Batch.of([[3]], [1000], [slot]), cache))
    close(ours, logits_of(backend, whole, [1000, 1])[-1:])
    assert cache.fork(slot, 0) != slot
    cache.truncate(slot, 0)


@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size])
def test_a_token_outside_the_vocabulary_is_refused(backend, wrong):
    cache = backend.new_cache(max_tokens=100)
    slot = cache.open()
    with pytest.raises(ValueError, match=f"token {wrong} is not in 0..63"):
        backend.forward(Batch.of([[3, wrong, 4]], [0], [slot]), cache)
    after = backend.to_numpy(backend.forward(Batch.of([[3]], [0], [slot]), cache))
    close(after, logits_of(backend, [3], [1]))


def test_a_position_past_the_context_is_refused(room, weights):
    small = replace(TINY, initial_context_length=512, rope_scaling_factor=2.0)
    backend = load(room, small, weights)
    cache = backend.new_cache(max_tokens=2000)
    slot = cache.open()
    backend.forward(Batch.of([text(1024)], [0], [slot]), cache)
    for row, past in (([1], 1024), (text(1025), 0)):
        with pytest.raises(ContextExceeded, match="position 1024 .* context of 1024"):
            backend.forward(Batch.of([row], [past], [slot]), cache)


def test_packed_experts_are_the_numbers_they_stand_for(room, tiny, weights):
    packed = {n: encode(w) if n.endswith("_weight") else w for n, w in weights.items()}
    dense = {n: w.decode() if n.endswith("_weight") else w for n, w in packed.items()}
    ours = logits_of(load(room, tiny, packed), text(20), [17, 1, 1, 1])
    close(ours, logits_of(load_backend("reference", tiny, dense.get), text(20), [20]))


@pytest.mark.parametrize("precision, allowed", [("exact", 1e-4), ("fast", 2e-2)])
def test_a_wide_model_in_either_precision(precision, allowed):
    """Where native multiplies integers, and packs dense matrices: every traced value, in pieces."""
    pytest.importorskip("gptoss._core", reason="gptoss was installed without a compiler")
    drawn = random_weights(WIDE, dtype=ml_dtypes.bfloat16, scale=0.02)
    packed = {
        n: encode(w.astype(np.float32)) if n.endswith("_weight") else w for n, w in drawn.items()
    }
    exact = {
        n: w.decode("float64") if n.endswith("_weight") else w.astype(np.float64)
        for n, w in packed.items()
    }
    truth = load_backend("reference", WIDE, exact.get, dtype="float64")
    ours = load_backend("native", WIDE, packed.get, precision=precision)
    rows = [text(30, WIDE), [7], text(3, WIDE)]
    true, found = trace_of(truth, rows), trace_of(ours, rows)
    assert list(found) == list(true)
    for name, x in true.items():
        if name.endswith((".chosen", ".share")):  # of equals the order is open
            found[name], x = np.sort(found[name]), np.sort(x)
        error = np.abs(found[name] - x).max() / np.abs(x).max()
        assert error <= allowed, f"{precision} first diverges at {name}: {error:.1e}"
    whole = logits_of(ours, text(38, WIDE), [38])
    np.testing.assert_array_equal(logits_of(ours, text(38, WIDE), [7, 1, 30]), whole)


def test_read_only_bfloat16_weights_are_welcome(room, tiny):
    """What a mapped checkpoint gives."""
    narrow = random_weights(tiny, dtype=ml_dtypes.bfloat16)
    for tensor in narrow.values():
        tensor.flags.writeable = False
    exact = {n: w.astype(np.float64) for n, w in narrow.items()}
    truth = load_backend("reference", tiny, exact.get, dtype="float64")
    close(logits_of(load(room, tiny, narrow), text(20), [20]), logits_of(truth, text(20), [20]))


def test_of_equal_experts_the_first_is_chosen(room, tiny, weights):
    tied = {n: np.zeros_like(w) if ".gate." in n else w for n, w in weights.items()}
    seen = trace_of(load(room, tiny, tied), [text(9)])
    for layer in range(tiny.num_hidden_layers):
        assert (seen[f"block.{layer}.mlp.chosen"] == [0, 1]).all()
        assert (seen[f"block.{layer}.mlp.share"] == 0.5).all()


def test_sampling_follows_the_rule_at_the_given_uniforms(backend):
    cache = backend.new_cache(max_tokens=100)
    batch = Batch.of([text(6)], [0], [cache.open()], [5, 5, 5])
    logits = backend.forward(batch, cache)
    order = np.argsort(-backend.to_numpy(logits)[0], kind="stable")
    rules = [Sampling(temperature=0), Sampling(top_k=1), Sampling(temperature=1e6, top_k=2)]
    picked = backend.sample(logits, rules, [0.9, 0.9, 0.75])
    assert picked == [order[0], order[0], order[1]]
