"""What is counted, against known figures, by hand, and step by step."""

from dataclasses import replace

import pytest

from gptoss.backends.protocol import Batch
from gptoss.bench.cost import by_chance, cost, seen, span, widths
from gptoss.model.config import gpt_oss_20b, gpt_oss_120b, nano


def one_token(config, precision, *, past=0, packed=True):
    held = widths(config, "native", precision, packed=packed)
    return cost(config, held, Batch.of([[1]], [past], [0]))


@pytest.mark.parametrize(
    "config, precision, gigabytes",
    [
        (gpt_oss_20b(), "exact", 3.15),
        (gpt_oss_20b(), "fast", 2.57),
        (gpt_oss_120b(), "exact", 4.31),
    ],
)
def test_bytes_of_a_token_are_those_published(config, precision, gigabytes):
    assert one_token(config, precision).bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_matrices_alone_are_what_the_files_hold():
    c = gpt_oss_20b()
    dense = 24 * (2880 * 5120 + 4096 * 2880 + 32 * 2880) + 201_088 * 2880
    experts = 24 * 4 * 3 * 2880 * 2880
    stored = 2 * dense + experts * 17 / 32
    assert stored / 1e9 == pytest.approx(3.70, abs=0.01)
    packed = 1.55 * dense + experts * 17 / 32  # but for the router
    assert one_token(c, "exact").bytes == pytest.approx(packed, rel=3e-3)  # vectors, keys
    assert one_token(c, "exact").operations == pytest.approx(2 * (dense + experts), rel=1e-4)
    assert one_token(c, "exact").operations / 1e9 == pytest.approx(7.2, abs=0.05)


def test_a_past_is_read_within_the_window_only():
    c = gpt_oss_20b()
    key_and_value = 2 * 8 * 64 * 2
    more = one_token(c, "fast", past=9999).bytes - one_token(c, "fast").bytes
    assert more == 12 * 9999 * key_and_value + 12 * 127 * key_and_value


def test_rows_share_the_weights_and_not_their_pasts():
    c = nano()
    held = widths(c, "native", "exact", packed=True)
    visited = [3.0] * c.num_hidden_layers
    alone = cost(c, held, Batch.of([[1]], [50], [0]), visited)
    two = cost(c, held, Batch.of([[1], [2]], [50, 50], [0, 1]), visited)
    embedded = c.hidden_size * 2
    keys = c.num_hidden_layers * 51 * 2 * c.num_key_value_heads * c.head_dim * 4
    assert two.bytes - alone.bytes == embedded + keys
    assert two.operations == 2 * alone.operations and two.experts == 2 * alone.experts


def test_operations_do_not_depend_on_how_a_prompt_is_cut():
    c = nano()
    held = widths(c, "torch", "bfloat16", packed=True)
    whole = cost(c, held, Batch.of([range(200)], [0], [0]))
    parts = [(0, 90, []), (90, 100, []), (190, 10, [9])]
    steps = [cost(c, held, Batch.of([range(n)], [p], [0], wanted)) for p, n, wanted in parts]
    assert sum(s.operations for s in steps) == whole.operations
    assert sum(s.bytes for s in steps) > whole.bytes


def test_only_experts_that_are_visited_are_read():
    c = gpt_oss_20b()
    held = widths(c, "native", "exact", packed=True)
    batch = Batch.of([[1], [2]], [0, 0], [0, 1])
    few, more = (cost(c, held, batch, [n] * 24) for n in (5, 6))
    matrices, biases = 3 * 2880 * 2880 * 17 / 32, 3 * 2880 * 4
    assert more.bytes - few.bytes == 24 * (matrices + biases)
    assert more.operations == few.operations


def test_without_logits_the_unembedding_is_not_read():
    c = gpt_oss_20b()
    held = widths(c, "native", "fast", packed=True)
    last, earlier = (cost(c, held, Batch.of([[1]], [0], [0], wanted)) for wanted in ([0], []))
    size = 201_088 * 2880
    assert last.bytes - earlier.bytes == size * 17 / 16
    assert last.operations - earlier.operations == 2 * size


@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("past, new", [(0, 1), (0, 20), (3, 4), (3, 9), (7, 1), (8, 1), (30, 5)])
def test_what_is_seen_is_what_a_mask_would_show(window, past, new):
    visible = [
        {k for k in range(q + 1) if window is None or k > q - window}
        for q in range(past, past + new)
    ]
    assert seen(past, new, window) == sum(map(len, visible))
    assert span(past, new, window) == len(set().union(*visible))


def test_chance_visits_all_experts_in_the_end():
    c = gpt_oss_20b()
    assert by_chance(c, 1) == pytest.approx(4)
    assert by_chance(c, 2) == pytest.approx(4 + 4 * 28 / 32)
    assert by_chance(c, 1000) == pytest.approx(32)
    few = replace(c, num_experts=4)
    assert by_chance(few, 1) == 4


def test_widths_follow_the_backend():
    small, large = nano(), gpt_oss_20b()
    assert widths(small, "reference", "float32", packed=True).expert == 4
    assert widths(large, "reference", "float32", packed=True).expert == 17 / 32
    assert widths(large, "torch", "bfloat16", packed=False).expert == 2
    assert widths(large, "native", "fast", packed=True).matrix == 17 / 16
    assert widths(large, "native", "exact", packed=True).matrix == 1.55
    assert widths(small, "native", "exact", packed=True).matrix == 2
