import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptoss.backends import load_backend
from gptoss.backends.protocol import Sampling
from gptoss.backends.sampling import sample
from gptoss.engine import Engine, Request
from gptoss.engine.draw import adjusted, derived, likeliest, log_softmax, uniform
from gptoss.errors import GptOssError
from tests.engine.scripted import CONFIG, Scripted

V = CONFIG.vocab_size
FREE = Sampling()


def ids(stream):
    return [d.token for d in stream]


def ask(backend=None, prompt=(1, 2), engine=None, **request):
    return Engine(backend or Scripted(), **engine or {}).submit(Request(prompt=prompt, **request))


def favourite(*tokens):
    """Logits that prefer ``tokens``, in this order."""
    row = np.zeros(V)
    for i, token in enumerate(tokens):
        row[token] = 100 - i
    return lambda _: row


# --- randomness


def philox(key, counter, rounds=10):
    """Philox4x64 as the paper has it: four words of 64 bits."""
    mask, x, (k0, k1) = 2**64 - 1, list(counter), key
    for _ in range(rounds):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [b >> 64 ^ x[1] ^ k0, b & mask, a >> 64 ^ x[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return x


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_a_uniform_is_philox_of_seed_and_position_alone(seed, position):
    word = philox((seed, position), (1, 0, 0, 0))[0]
    assert uniform(seed, position) == (word >> 11) * 2.0**-53


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        uniform(seed, 0)


def test_the_seeds_of_many_answers_differ_and_the_first_is_the_requests():
    seeds = [derived(seed, i) for seed in range(20) for i in range(20)]
    assert len(set(seeds)) == 400 and seeds[::20] == [*range(20)]


@pytest.fixture(scope="module")
def rooms(tiny, weights):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # more only get in each other's way on so small a model
    return [
        load_backend(name, tiny, weights.__getitem__, dtype="float32")
        for name in ("reference", "torch")
    ]


@pytest.mark.parametrize(
    "rule",
    [Sampling(temperature=0.0), FREE, Sampling(temperature=0.7, top_k=8, top_p=0.9, min_p=0.02)],
    ids=["greedy", "free", "filtered"],
)
def test_a_seed_means_the_same_on_every_backend(rooms, rule):
    for seed in range(2):
        how = {"sampling": rule, "seed": seed, "max_tokens": 16, "n": 2, "presence_penalty": 0.1}
        a, b = (ask(room, [5, 6, 7], **how) for room in rooms)
        assert ids(a) == ids(b)


def test_an_answer_can_be_taken_up_anywhere():
    how = {"sampling": FREE, "seed": 3}
    whole = ids(ask(max_tokens=8, **how))
    for n in range(8):
        assert ids(ask(prompt=[1, 2, *whole[:n]], max_tokens=8 - n, **how)) == whole[n:]


def test_answers_to_one_request_are_those_to_requests_of_their_seeds():
    stream = ask(sampling=FREE, seed=9, n=4, max_tokens=7)
    drawn = list(stream)
    for i, answer in enumerate(stream.answers):
        assert answer.tokens == ids(ask(sampling=FREE, seed=derived(9, i), max_tokens=7))
        assert [d for d in drawn if d.row == i] == answer.drawn
    assert len({tuple(a.tokens) for a in stream.answers}) == 4


# --- what is drawn


def test_greedy_takes_the_likeliest_and_ends_with_the_stop_token():
    script = [5, 9, 7, 3, 3]
    stream = ask(
        Scripted(lambda tokens: favourite(script[len(tokens) - 2])(None)),
        stop_tokens=frozenset({7}),
        speculate=False,
    )
    assert (ids(stream), stream.finish) == ([5, 9, 7], "stop")


def test_no_stop_tokens_ignore_the_end():
    stream = ask(Scripted(favourite(7)), max_tokens=5)
    assert (ids(stream), stream.finish) == ([7] * 5, "length")


@given(st.integers(0, 2**64 - 1), st.integers(1, V))
def test_padding_is_never_drawn_however_likely(seed, size):
    backend = Scripted(favourite(*range(size, V)))
    for rule in (FREE, Sampling(temperature=0.0), Sampling(top_k=3), Sampling(top_p=0.5)):
        for bias in ({}, {0: 0.5}):
            drawn = list(
                ask(
                    backend,
                    engine={"vocab_size": size},
                    sampling=rule,
                    seed=seed,
                    max_tokens=3,
                    logprobs=2,
                    logit_bias=bias,
                )
            )
            assert all(0 <= d.token < size and d.logprob > -math.inf for d in drawn)
            assert all(len(d.top) == min(2, size) and d.top[-1][0] < size for d in drawn)


def test_logprobs_are_the_models_own_before_penalties_temperature_and_filters():
    backend = Scripted()
    rule = Sampling(temperature=0.5, top_k=4, min_p=0.1)
    how = {"sampling": rule, "max_tokens": 6, "logprobs": 3, "logit_bias": {5: 3.0}}
    tokens = [3, 4]
    for d in ask(backend, [3, 4], **how):
        expected = log_softmax(np.asarray(backend.noise(tokens), np.float32))
        assert d.logprob == pytest.approx(expected[d.token])
        order = sorted(range(V), key=lambda t: -expected[t])[:3]
        assert [t for t, _ in d.top] == order
        tokens.append(d.token)


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("room", [None, 30])
def test_logprobs_of_a_prompt_are_those_of_its_tokens(step, room):
    backend, prompt = Scripted(), [3, 1, 4, 1, 5, 9, 2, 6]
    engine = Engine(backend, step_tokens=step, max_tokens=room)
    for _ in range(2):  # remembered or not
        other = engine.submit(Request(prompt=[7] * 9, max_tokens=12))
        stream = engine.submit(Request(prompt=prompt, max_tokens=12, prompt_logprobs=2))
        assert len(list(stream)) == len(list(other)) == 12
        scored = stream.prompt_logprobs
        assert [d.token for d in scored] == prompt[1:]
        for i, d in enumerate(scored, 1):
            expected = log_softmax(np.asarray(backend.noise(prompt[:i]), np.float32))
            assert d.logprob == pytest.approx(expected[prompt[i]])
            assert d.top == tuple(likeliest(expected, 2))


ROWS = arrays(np.float64, 12, elements=st.sampled_from([-np.inf, -3.0, 0.0, 0.25, 1.0]))


@given(ROWS, st.integers(0, 15))
def test_the_likeliest_are_sorted_and_of_equals_the_first(row, k):
    order = sorted(range(12), key=lambda t: (-row[t], t))[:k]
    assert likeliest(row, k) == [(t, row[t]) for t in order]


def test_penalties_in_their_order_by_hand():
    logits = np.array([2.0, -2.0, 1.0, 0.0, 5.0, 5.0], np.float32)
    request = Request(
        prompt=[0, 1],
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={3: 7.0, 5: -math.inf},
        min_tokens=4,
        stop_tokens=frozenset({4}),
    )
    got = adjusted(logits, request, [2, 2, 1], None)
    #        seen /2   seen *2, once    seen /2, twice  bias   stop      forbidden
    assert got.tolist() == [1.0, -4.0 - 0.75, 0.5 - 1.25, 7.0, -math.inf, -math.inf]
    assert logits[0] == 2.0, "the logits are the backend's"
    assert adjusted(logits, request, [2, 2, 1, 1], None)[4] == 5.0


def test_penalties_drive_repetition_out():
    stuck = Scripted(lambda tokens: np.eye(V)[7] * 4 + np.eye(V)[8] * 3.5)
    assert ids(ask(stuck, max_tokens=4)) == [7, 7, 7, 7]
    assert ids(ask(stuck, max_tokens=4, frequency_penalty=0.4)) == [7, 7, 8, 7]
    assert len(set(ids(ask(stuck, max_tokens=4, presence_penalty=5.0)))) == 4
    assert ids(ask(stuck, [7], max_tokens=1, repetition_penalty=2.0)) == [8]


def test_min_tokens_keep_the_end_away_and_no_longer():
    ends = Scripted(favourite(7, 8))
    for least in range(4):
        stream = ask(ends, stop_tokens=frozenset({7}), min_tokens=least, max_tokens=9)
        assert ids(stream) == [8] * least + [7]


def test_forbidding_everything_is_said():
    only_one_is_left = dict.fromkeys(range(1, V), -math.inf)
    stream = ask(logit_bias=only_one_is_left, stop_tokens=frozenset({0}), min_tokens=2)
    with pytest.raises(GptOssError, match="no token is allowed after 0 of the answer"):
        next(stream)


# --- several answers


def test_best_of_keeps_the_likeliest():
    many = ask(sampling=FREE, n=6, seed=4, max_tokens=5, logprobs=0)
    list(many)
    means = [np.mean([d.logprob for d in a.drawn]) for a in many.answers]
    best = ask(sampling=FREE, n=2, best_of=6, seed=4, max_tokens=5)
    list(best)
    order = np.argsort(means)[::-1][:2]
    assert [a.tokens for a in best.answers] == [many.answers[i].tokens for i in order]
    assert [a.score for a in best.answers] == pytest.approx([means[i] for i in order])


def brute_force(backend, prompt, size, limit, stop, penalty):
    """Every answer there is, with its score."""
    found, open_ = [], [([], 0.0)]
    while open_:
        tokens, score = open_.pop()
        row = np.asarray(backend.noise([*prompt, *tokens]), np.float32)[:size]
        for token, logprob in enumerate(log_softmax(row)):
            whole, total = [*tokens, token], score + logprob
            if token in stop or len(whole) == limit:
                found.append((total / len(whole) ** penalty, whole))
            else:
                open_.append((whole, total))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [1.0, 0.0, 0.6, 2.0, -0.5])
@pytest.mark.parametrize("stop", [frozenset(), frozenset({2})])
def test_wide_beams_find_what_brute_force_finds(penalty, stop):
    for prompt in ([1, 2], [5], [9, 9, 9]):
        truth = brute_force(Scripted(), prompt, 4, 4, stop, penalty)[:3]
        stream = ask(
            prompt=prompt,
            engine={"vocab_size": 4, "max_tokens": 64, "rows": 8},
            beams=64,
            n=3,
            max_tokens=4,
            stop_tokens=stop,
            length_penalty=penalty,
        )
        list(stream)
        assert [a.tokens for a in stream.answers] == [tokens for _, tokens in truth]
        assert [a.score for a in stream.answers] == pytest.approx([score for score, _ in truth])


def beam_by_hand(backend, prompt, size, width, limit):
    live = [([], 0.0)]
    for _ in range(limit):
        pool = [
            ([*tokens, t], score + x)
            for tokens, score in live
            for t, x in enumerate(
                log_softmax(np.asarray(backend.noise([*prompt, *tokens]), np.float32)[:size])
            )
        ]
        live = sorted(pool, key=lambda c: -c[1])[:width]
    return live


@pytest.mark.parametrize("squeeze", [{}, {"step_tokens": 2}, {"max_tokens": 16}, {"rows": 2}])
def test_narrow_beams_are_the_textbooks(squeeze):
    for prompt in ([1, 2], [5, 1, 1]):
        truth = beam_by_hand(Scripted(), prompt, 9, 3, 6)
        stream = ask(prompt=prompt, engine={"vocab_size": 9, **squeeze}, beams=3, n=3, max_tokens=6)
        list(stream)
        assert [a.tokens for a in stream.answers] == [tokens for tokens, _ in truth]


def test_one_beam_is_greedy():
    assert ids(ask(beams=1, max_tokens=9)) == ids(ask(max_tokens=9))


# --- constraints


class Script:
    """Allows these tokens only, one after another; what has no choice may be ``forced``."""

    def __init__(self, sets, at=0, accepted=()):
        self.sets, self.at, self.accepted = sets, at, [*accepted]

    def mask(self):
        allowed = np.zeros(V, bool)
        allowed[list(self.sets[self.at])] = True
        return allowed if self.sets[self.at] else None

    def accept(self, token):
        assert not self.sets[self.at] or token in self.sets[self.at]
        self.at += 1
        self.accepted.append(token)

    def fork(self):
        return type(self)(self.sets, self.at, self.accepted)


class Forcing(Script):
    def forced(self):
        forced = []
        for allowed in self.sets[self.at :]:
            if len(allowed) != 1:
                break
            forced += allowed
        return forced


SETS = [{3}, {4}, {5, 6, 9}, {7}, (), {8}, {8}, {1, 2}]


@pytest.mark.parametrize("kind", [Script, Forcing])
@pytest.mark.parametrize("more", [{}, {"n": 3}, {"beams": 2}, {"n": 2, "best_of": 4}])
def test_a_constraint_is_kept_by_every_answer(kind, more):
    mine = kind(SETS)
    stream = ask(constraint=mine, max_tokens=8, sampling=FREE, seed=5, **more)
    list(stream)
    for answer in stream.answers:
        assert all(not s or t in s for s, t in zip(SETS, answer.tokens, strict=True))
    assert mine.at == 0 and not mine.accepted, "the caller's own is never changed"


@pytest.mark.parametrize("seed", range(5))
def test_forced_tokens_save_steps_and_change_nothing(seed):
    drawn = []
    for kind, logprobs in ((Script, None), (Forcing, None), (Script, 1), (Forcing, 1)):
        backend = Scripted()
        how = {"sampling": FREE, "seed": seed, "max_tokens": 8, "speculate": False}
        stream = ask(backend, constraint=kind(SETS), logprobs=logprobs, **how)
        drawn.append(list(stream))
        chosen_freely = [s for s in SETS if len(s) != 1]
        saves = kind is Forcing and logprobs is None
        assert len(backend.steps) == (len(chosen_freely) + 1 if saves else len(SETS))
    assert len({tuple(d.token for d in answer) for answer in drawn}) == 1
    assert drawn[2] == drawn[3]


def test_forced_tokens_end_where_the_answer_does():
    chain = [{3}, {4}, {5}, {6}, {7}]
    stream = ask(constraint=Forcing(chain), max_tokens=3)
    assert (ids(stream), stream.finish) == ([3, 4, 5], "length")
    stream = ask(constraint=Forcing(chain), stop_tokens=frozenset({4}))
    assert (ids(stream), stream.finish) == ([3, 4], "stop")


def test_a_constraint_that_fails_ends_its_own_request():
    engine = Engine(Scripted())
    bad = engine.submit(Request(prompt=[1], constraint=Script([{3}]), max_tokens=9))
    good = engine.submit(Request(prompt=[1], max_tokens=9))
    assert len(ids(good)) == 9 and bad.finish == "error"
    assert next(bad).token == 3
    with pytest.raises(IndexError):
        next(bad)


def test_the_host_rule_and_the_backends_are_one():
    """What is adjusted on the host is drawn as the backend would draw it."""
    how = {"sampling": Sampling(temperature=0.9, top_k=9), "seed": 8, "max_tokens": 9}
    assert ids(ask(logit_bias={5: 0.0}, **how)) == ids(ask(**how))
    row = np.asarray(Scripted().noise([1, 2]), np.float32)
    assert ids(ask(**how))[0] == sample(row, how["sampling"], uniform(8, 2))
