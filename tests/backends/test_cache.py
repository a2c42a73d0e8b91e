"""The torch cache against a list that forgets nothing."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from gptoss.backends.torch.cache import SPARE, Strip, TorchCache  # noqa: E402
from gptoss.errors import CacheFull, CacheMiss  # noqa: E402
from tests.conftest import TINY  # noqa: E402

ROW = 4 * 2 * 2 * 16 * 4  # bytes of a token: layers, key and value, key heads, head_dim, float32


def keys(numbers):
    """[K, t, d] whose every value is its token's number, never 0."""
    return torch.tensor(numbers, dtype=torch.float32)[None, :, None].expand(2, -1, 16)


def extend(cache, slot, numbers):
    """Append to every layer; what each of them shows its queries, as lists of numbers."""
    new = keys(numbers)
    seen = [strip.extend(new, -new) for strip in cache.strips[slot]]
    for k, v in seen:
        assert (k == -v).all()
        assert (k[:, 0] == 0).all(), "the sink's row is zero for ever"
    return [k[0, 1:, 0].int().tolist() for k, _ in seen]


steps = st.lists(
    st.tuples(
        st.sampled_from(["extend", "truncate", "fork", "open", "close"]),
        st.integers(0, 7),
        st.integers(1, 300),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps)
def test_every_layer_shows_what_its_queries_may_see(ops):
    cache = TorchCache(TINY, 100_000)
    rows, counter, longest = {cache.open(): []}, 1, {0: 0}
    for op, which, n in ops:
        slot = sorted(rows)[which % len(rows)] if rows else None
        if op == "open" or slot is None:
            slot = cache.open()
            rows[slot], longest[slot] = [], 0
        elif op == "extend":
            new = list(range(counter, counter + n))
            counter += n
            rows[slot] += new
            longest[slot] = max(longest[slot], len(rows[slot]))
            for layer, seen in enumerate(extend(cache, slot, new)):
                window = TINY.window(layer) or len(rows[slot])
                assert seen == rows[slot][-len(seen) :]
                assert len(seen) >= min(len(rows[slot]), n + window - 1)
        elif op == "close":
            cache.close(slot)
            del rows[slot]
        else:
            length = max(0, len(rows[slot]) - n)
            try:
                if op == "fork":
                    child = cache.fork(slot, length)
                    rows[child], longest[child] = rows[slot][:length], longest[slot]
                else:
                    cache.truncate(slot, length)
                    rows[slot] = rows[slot][:length]
            except CacheMiss:
                assert longest[slot] - length > SPARE, "that much can always be rewound"


def test_sliding_layers_stop_growing():
    sliding = TorchCache(replace(TINY, num_hidden_layers=1), 100_000)
    slot, sizes = sliding.open(), []
    for start in range(0, 6000, 7):
        extend(sliding, slot, list(range(start, start + 7)))
        sizes.append(sliding.nbytes)
    most = ROW // 4 * (1 + TINY.sliding_window + 2 * SPARE)
    assert max(sizes) <= most
    extend(sliding, slot, list(range(5000)))
    assert sliding.nbytes <= most, "not even after one long step"


def test_full_layers_grow_in_few_steps_and_by_a_quarter():
    cache = TorchCache(TINY, 100_000)
    slot, sizes = cache.open(), set()
    for token in range(3000):
        extend(cache, slot, [token])
        sizes.add(cache.strips[slot][1].k.shape[1])
    assert len(sizes) < 30, "a new buffer for every token would copy the past each time"
    assert max(sizes) <= 1 + 3000 * 5 // 4


def test_rewinding_gives_the_memory_back():
    cache = TorchCache(TINY, 10_000)
    slot = cache.open()
    extend(cache, slot, list(range(100)))
    cache.truncate(slot, 0)
    assert cache.nbytes == ROW
    cache.close(slot)
    assert cache.nbytes == 0


def test_a_miss_changes_nothing():
    cache = TorchCache(TINY, 1000)
    slot = cache.open()
    cache.reserve(slot, 900)
    extend(cache, slot, list(range(1, 901)))
    for refused in (cache.truncate, cache.fork):
        with pytest.raises(CacheMiss, match="first 300 tokens"):
            refused(slot, 300)
    assert cache.reserved == {slot: 900}
    assert list(cache.strips) == [slot]
    assert extend(cache, slot, [901])[1] == list(range(1, 902))


def test_a_rewind_ends_exactly_where_the_window_does():
    cache = TorchCache(replace(TINY, num_hidden_layers=1), 10_000)
    slot = cache.open()
    extend(cache, slot, list(range(1, 1001)))
    furthest = cache.strips[slot][0].first + TINY.sliding_window - 1
    with pytest.raises(CacheMiss):
        cache.truncate(slot, furthest - 1)
    cache.truncate(slot, furthest)
    (seen,) = extend(cache, slot, [7])
    assert seen == [*range(furthest - TINY.sliding_window + 2, furthest + 1), 7]


def test_a_long_row_can_always_start_again():
    cache = TorchCache(TINY, 10_000)
    slot = cache.open()
    extend(cache, slot, list(range(1, 1001)))
    child = cache.fork(slot, 0)
    cache.truncate(slot, 0)
    for again in (slot, child):
        assert extend(cache, again, [7, 8]) == [[7, 8]] * 4


def test_a_fork_writes_into_memory_of_its_own():
    cache = TorchCache(TINY, 1000)
    parent = cache.open()
    extend(cache, parent, list(range(1, 21)))
    extend(cache, parent, [21])  # now there is room for more, which must not be shared
    child = cache.fork(parent, 21)
    extend(cache, parent, [22])
    extend(cache, child, [99])
    assert extend(cache, parent, [23])[1] == list(range(1, 24))


def test_a_full_cache_opens_no_slot():
    cache = TorchCache(TINY, 30)
    slot = cache.open()
    cache.reserve(slot, 20)
    extend(cache, slot, list(range(20)))
    with pytest.raises(CacheFull):
        cache.fork(slot, 11)
    assert list(cache.strips) == list(cache.reserved) == [slot]


def test_a_buffer_never_outgrows_its_limit():
    empty = torch.zeros(2, 1, 16)
    strip = Strip(empty, empty, 8)
    for _ in range(1000):
        strip.extend(keys([1]), keys([1]))
        assert strip.k.shape[1] <= 1 + 7 + 2 * SPARE
        assert strip.held >= min(strip.length, 7 + SPARE)
