"""What was computed is not computed again, and nobody gets another's past."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.engine import Engine, Request
from gptoss.engine.prefix import Prefixes, common
from tests.engine.scripted import CONFIG, History, Scripted, slots_in_use

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def filled(prefixes, tokens, stays=False):
    """A slot that has computed ``tokens``, given to ``prefixes``."""
    cache = prefixes.cache
    slot = cache.open()
    cache.reserve(slot, len(tokens))
    cache.held[slot] += tokens
    prefixes.add(tokens, slot, stays=stays)


def spread(node):
    """All nodes below."""
    for child in node.children.values():
        yield child
        yield from spread(child)


@given(
    st.lists(st.tuples(st.sampled_from(["add", "stay", "take", "copy", "evict"]), TOKENS)),
    st.sampled_from([None, 0, 2, 5]),
)
def test_the_tree_gives_the_longest_prefix_that_the_caches_still_hold(jobs, window):
    cache = History(10_000, window)
    prefixes = Prefixes(cache)
    for job, tokens in jobs:
        known = {tuple(cache.held[node.slot]): node.stays for node in prefixes.used}
        if job == "evict":
            assert prefixes.evict() == bool(known)
        elif job == "copy":
            slot = cache.open()
            cache.reserve(slot, 12)
            cache.held[slot] += [*tokens, 0, 1]
            if tokens:
                prefixes.copy(tokens, slot)
                can = window is None or window >= 2 or tuple(tokens) in known
                assert can == (tuple(tokens) in {tuple(cache.held[n.slot]) for n in prefixes.used})
            cache.close(slot)
        elif job != "take" and tokens:
            filled(prefixes, tokens, stays=job == "stay")
        elif job == "take":
            shared = {k: common(k, tokens) for k in known}
            held = [n for k, n in shared.items() if window is None or len(k) - n <= window]
            found = prefixes.take(tokens)
            assert (found[1] if found else 0) == max(held, default=0)
            if found:
                assert cache.held[found[0]] == tokens[: found[1]]
                cache.close(found[0])
            left = {tuple(cache.held[node.slot]) for node in prefixes.used}
            assert all(k in left for k, stays in known.items() if stays), "a boundary is copied"
            assert len(known) - len(left) <= 1
        for node in spread(prefixes.root):
            assert node.slot is not None or len(node.children) > 1
            assert node.depth == node.parent.depth + len(node.edge)
        assert {n for n in spread(prefixes.root) if n.slot is not None} == set(prefixes.used)
        assert set(cache.reserved) == {node.slot for node in prefixes.used}
        assert prefixes.tokens == sum(cache.reserved.values())
    prefixes.clear()
    assert not cache.reserved and not prefixes.root.children and not prefixes.tokens


def test_the_least_recently_used_goes_first():
    prefixes = Prefixes(History(100))
    for tokens in ([0, 0], [1, 1], [2, 2], [2, 2, 7]):
        filled(prefixes, tokens, stays=True)
    prefixes.take([1, 1])
    prefixes.take([2, 2, 7, 7])
    gone = []
    while prefixes.used:
        gone.append(prefixes.cache.held[next(iter(prefixes.used)).slot][:])
        prefixes.evict()
    assert gone == [[0, 0], [1, 1], [2, 2, 7], [2, 2]], "what others go on from is used with them"


def test_a_full_cache_forgets_others_before_what_is_asked_for():
    prefixes = Prefixes(History(10))
    filled(prefixes, [1, 2, 3, 4], stays=True)
    filled(prefixes, [5, 6, 7, 8])
    slot, held = prefixes.take([1, 2, 3, 4, 9])
    assert held == 4 and len(prefixes) == 1, "copied, for the other made room"
    again = prefixes.take([1, 2, 3, 4, 9])
    assert again[1] == 4 and again[0] != slot and not prefixes, "taken over, for there was none"


def computed(backend):
    """Tokens that the backend was given since it was last asked."""
    total = sum(new for step in backend.steps for _, new in step)
    backend.steps.clear()
    return total


def test_a_longer_conversation_costs_its_new_tokens_only():
    backend = Scripted()
    engine = Engine(backend)
    first = engine.submit(Request(prompt=[1, 2, 3, 4], max_tokens=3))
    answer = [d.token for d in first]
    assert first.reused == 0 and computed(backend) == 6
    second = engine.submit(Request(prompt=[1, 2, 3, 4, *answer, 8, 9], max_tokens=1))
    assert len(list(second)) == 1 and second.reused == 6  # the last token drawn had not been fed
    assert computed(backend) == 3


def test_the_same_prompt_again_computes_its_last_token_only():
    backend = Scripted(window=4)
    engine = Engine(backend)
    request = Request(prompt=[1, 2, 3], max_tokens=2)
    drawn = [list(engine.submit(request)) for _ in range(2)]
    assert drawn[0] == drawn[1] and backend.steps[2] == [(2, 1)]


def test_who_is_not_to_be_remembered_is_not():
    engine = Engine(Scripted())
    list(engine.submit(Request(prompt=[1, 2], max_tokens=3, remember=False, boundaries=[1])))
    assert not engine.scheduler.cache.reserved


@pytest.mark.parametrize("step_tokens", [8, 64, 1000])
def test_requests_that_come_together_compute_their_common_beginning_once(step_tokens):
    """Up to where the first one says that others may part from it."""
    config, shared = replace(CONFIG, initial_context_length=1024), [7] * 100
    backend = Scripted(config=config, window=8)
    engine = Engine(backend, max_tokens=1000, step_tokens=step_tokens)
    prompts = [[*shared, i, 1, 2] for i in range(4)] + [[9, 1, 2]]
    streams = [
        engine.submit(Request(prompt=p, max_tokens=2, boundaries=[100] if len(p) > 9 else []))
        for p in prompts
    ]
    assert [len(list(s)) for s in streams] == [2] * 5
    assert [s.reused for s in streams] == [0, 100, 100, 100, 0] and not slots_in_use(engine)
    assert computed(backend) == 103 + 3 * 3 + 3 + 5  # and the first of two tokens each
    alone = [Engine(Scripted(config=config)).submit(s.request) for s in streams]
    assert [[d.token for d in a] for a in alone] == [s.answers[0].tokens for s in streams]


def turns(count):
    """Prompts of a conversation, each with what the model then says: thoughts that the next prompt
    leaves out, and an answer that stays. Tokens 60 begin a message."""
    history = [60, *range(40)]  # the system's
    for turn in range(count):
        history += [60, 41, turn, turn, turn]
        yield list(history), [60, 42, *[43 + turn] * 30, 60, 44, turn, turn + 1]
        history += [60, 44, turn, turn + 1]


@pytest.mark.parametrize("window, computed_anew", [(None, 46 + 9 * 8), (8, 46 + 9 * 9)])
def test_ten_turns_compute_what_is_new(window, computed_anew):
    """Thoughts are dropped from a conversation's middle, where a window cannot go back to."""
    said = {}
    config = replace(CONFIG, initial_context_length=1024)

    def logits_of(tokens):
        row = [0.0] * CONFIG.vocab_size
        prompt = max((p for p in said if tuple(tokens[: len(p)]) == p), key=len)
        row[said[prompt][len(tokens) - len(prompt)]] = 9.0
        return row

    backend = Scripted(logits_of, config=config, window=window)
    engine = Engine(backend)
    whole = new = 0
    before = []
    for prompt, answer in turns(10):
        said[tuple(prompt)] = [*answer, 63]
        stream = engine.submit(
            Request(
                prompt=prompt,
                stop_tokens=frozenset({63}),
                boundaries=[len(prompt)],
                speculate=False,
            )
        )
        assert [d.token for d in stream] == [*answer, 63]
        assert stream.reused == common(before, prompt) and not slots_in_use(engine)
        before = prompt if window else [*prompt, *answer]  # where it can be gone back to
        assert computed(backend) == len(prompt) - stream.reused + len(answer)
        whole, new = whole + len(prompt), new + len(prompt) - stream.reused
    assert (whole, new) == (865, computed_anew)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_is_the_longest_shared_beginning(a, b):
    n = common(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])
