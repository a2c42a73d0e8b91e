"""The native cache against a list that forgets nothing."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("gptoss._core", reason="gptoss was installed without a compiler")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss.backends.native.cache import PAGE, SPARE, NativeCache, NativeView
from gptoss.backends.protocol import Batch
from gptoss.errors import CacheFull, CacheMiss
from tests.conftest import TINY

LAYERS, K, d = TINY.num_hidden_layers, TINY.num_key_value_heads, TINY.head_dim
PAGE_BYTES = 2 * PAGE * K * d * 4
ONE = replace(TINY, num_hidden_layers=1)  # a sliding layer alone


def numbers(strip):
    """The numbers whose keys and values a strip holds, oldest first."""
    pages = [strip.pages[i] for i in range(strip.gone, -(-strip.length // PAGE))]
    assert len(pages) == len(strip.pages)
    assert np.flatnonzero(strip.table).tolist() == sorted(strip.pages)
    seen = []
    for i, page in enumerate(pages, strip.gone):
        assert strip.table[i] == page.address == page.data.ctypes.data
        keys, values = np.split(page.data.view(np.float32).reshape(K, -1), 2, axis=1)
        k = keys.reshape(K, PAGE // 16, d, 16).transpose(1, 3, 0, 2).reshape(PAGE, -1)
        v = values.reshape(K, PAGE, d).transpose(1, 0, 2).reshape(PAGE, -1)
        some = slice(0, strip.length - i * PAGE)
        assert (k[some] == -v[some]).all() and (k[some] == k[some, :1]).all()
        seen += k[some, 0].astype(int).tolist()
    return seen


def extend(cache, slot, new):
    """Append to every layer; what each of them then holds, as lists of numbers."""
    k = np.broadcast_to(np.array(new, np.float32)[:, None, None], (len(new), K, d)).copy()
    q, sinks = np.zeros((len(new), 2 * K, d), np.float32), np.zeros(2 * K, np.float32)
    strips = cache.strips[slot]
    view = NativeView(cache, Batch.of([[0] * len(new)], [strips[0].length], [slot]))
    for i in range(len(strips)):
        view.attend(i, q, k, -k, sinks, cache.config.window(i))
    return [numbers(strip) for strip in strips]


def cache_of(config, max_tokens):
    return NativeCache(config, max_tokens, "float32")


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
def test_every_layer_holds_what_its_next_query_may_see(ops):
    cache = cache_of(TINY, 100_000)
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
            extend(cache, slot, new)
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
        for slot, row in rows.items():  # also of those that nothing was done to
            for layer, strip in enumerate(cache.strips[slot]):
                held = numbers(strip)
                assert strip.length == len(row) and held == row[len(row) - len(held) :]
                assert len(held) >= min(len(row), (TINY.window(layer) or len(row)) - 1)
    for slot in rows:
        cache.close(slot)
    assert cache.nbytes == 0


def test_sliding_layers_stop_growing():
    cache = cache_of(ONE, 100_000)
    slot, sizes = cache.open(), []
    for start in range(0, 3000, 7):
        extend(cache, slot, list(range(start, start + 7)))
        sizes.append(cache.nbytes)
    most = -(-(TINY.sliding_window + SPARE) // PAGE) + 1
    assert max(sizes) <= PAGE_BYTES * most
    extend(cache, slot, list(range(5000)))
    assert cache.nbytes <= PAGE_BYTES * most, "not even after one long step"


def test_a_full_layer_takes_a_page_at_a_time():
    cache = cache_of(replace(TINY, num_hidden_layers=2), 100_000)
    slot = cache.open()
    for length in (1, PAGE - 2, 1, 1, 1000):
        extend(cache, slot, [1] * length)
        assert len(cache.strips[slot][1].pages) == -(-cache.strips[slot][1].length // PAGE)


def test_a_page_is_as_large_as_its_numbers():
    assert cache_of(TINY, 1).page_bytes == PAGE_BYTES
    assert NativeCache(TINY, 1).page_bytes == PAGE_BYTES // 2
    odd = replace(TINY, head_dim=18, rope_scaling_factor=1.0)
    assert NativeCache(odd, 1).page_bytes == K * PAGE * (18 + 32) * 2, "values lie in whole vectors"
    with pytest.raises(ValueError, match="not int4"):
        NativeCache(TINY, 1, "int4")


def test_rewinding_gives_the_memory_back():
    cache = cache_of(TINY, 10_000)
    slot = cache.open()
    extend(cache, slot, list(range(300)))
    cache.truncate(slot, 0)
    assert cache.nbytes == 0
    extend(cache, slot, [1])
    assert cache.nbytes == LAYERS * PAGE_BYTES
    cache.close(slot)
    assert cache.nbytes == 0


def test_a_miss_changes_nothing():
    cache = cache_of(TINY, 1000)
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
    cache = cache_of(ONE, 10_000)
    slot = cache.open()
    extend(cache, slot, list(range(1, 1001)))
    furthest = cache.strips[slot][0].first + TINY.sliding_window - 1
    assert 1000 - furthest >= SPARE
    with pytest.raises(CacheMiss):
        cache.truncate(slot, furthest - 1)
    cache.truncate(slot, furthest)
    (held,) = extend(cache, slot, [7])
    assert held == [*range(furthest - TINY.sliding_window + 2, furthest + 1), 7]


def test_a_long_row_can_always_start_again():
    cache = cache_of(TINY, 10_000)
    slot = cache.open()
    extend(cache, slot, list(range(1, 1001)))
    child = cache.fork(slot, 0)
    cache.truncate(slot, 0)
    for again in (slot, child):
        assert extend(cache, again, [7, 8]) == [[7, 8]] * LAYERS


@pytest.mark.parametrize("length", [300, 256, 257, 200])
def test_a_fork_shares_pages_until_one_of_the_two_writes(length):
    cache = cache_of(TINY, 10_000)
    parent = cache.open()
    extend(cache, parent, list(range(1, 301)))
    before = cache.nbytes
    child = cache.fork(parent, length)
    assert cache.nbytes == before, "a fork costs no memory"
    extend(cache, child, [-5])
    assert cache.nbytes == before + LAYERS * PAGE_BYTES, "only the page it writes is its own"
    extend(cache, parent, [301])
    assert cache.nbytes == before + LAYERS * PAGE_BYTES
    for slot, row in ((parent, [*range(1, 302)]), (child, [*range(1, length + 1), -5])):
        assert numbers(cache.strips[slot][1]) == row


def test_a_parent_and_its_forks_may_write_in_one_step():
    cache = cache_of(TINY, 10_000)
    slots = [cache.open()]
    extend(cache, slots[0], list(range(1, 21)))
    slots += [cache.fork(slots[0], 20) for _ in range(3)]
    k = np.array([100, 200, 300, 400], np.float32)[:, None, None] * np.ones((1, K, d), np.float32)
    q, sinks = np.zeros((4, 2 * K, d), np.float32), np.zeros(2 * K, np.float32)
    view = NativeView(cache, Batch.of([[0]] * 4, [20] * 4, slots))
    for i in range(LAYERS):
        view.attend(i, q, k, -k, sinks, TINY.window(i))
    for slot, last in zip(slots, (100, 200, 300, 400), strict=True):
        assert numbers(cache.strips[slot][1]) == [*range(1, 21), last]


def test_a_full_cache_opens_no_slot():
    cache = cache_of(TINY, 30)
    slot = cache.open()
    cache.reserve(slot, 20)
    extend(cache, slot, list(range(20)))
    with pytest.raises(CacheFull):
        cache.fork(slot, 11)
    assert list(cache.strips) == list(cache.reserved) == [slot]
