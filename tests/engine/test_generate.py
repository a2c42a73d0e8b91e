import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.backends import load_backend
from gptoss.backends.protocol import Sampling
from gptoss.engine.generate import Generator, common, log_softmax, uniform
from gptoss.errors import ContextExceeded, GptOssError
from tests.engine.scripted import CONFIG, Scripted

V, ROOM = CONFIG.vocab_size, CONFIG.context_length
PROMPTS = st.lists(st.integers(0, V - 1), min_size=1, max_size=30)
FREE = Sampling()


def ids(drawn):
    return [d.token for d in drawn]


def favourite(*tokens, length=V):
    """Logits that prefer ``tokens``, in this order."""
    row = np.zeros(length)
    for i, token in enumerate(tokens):
        row[token] = 100 - i
    return lambda _: row


@pytest.fixture(scope="module")
def reference(tiny, weights):
    return load_backend("reference", tiny, weights.__getitem__)


@pytest.fixture(scope="module")
def torch_room(tiny, weights):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # more only get in each other's way on so small a model
    return load_backend("torch", tiny, weights.__getitem__, dtype="float32")


# --- what is drawn


def test_greedy_takes_the_likeliest_and_ends_with_the_stop_token():
    script = iter([5, 9, 7, 3, 3])
    engine = Generator(Scripted(lambda _: favourite(next(script))(None)))
    assert ids(engine.generate([1, 2], stop_tokens=frozenset({7}))) == [5, 9, 7]


@settings(max_examples=30, deadline=None)
@given(PROMPTS, st.integers(0, 2**64 - 1), st.integers(1, V))
def test_padding_is_never_drawn_however_likely(prompt, seed, size):
    backend = Scripted(favourite(*range(size, V)))
    for rule in (FREE, Sampling(temperature=0.0), Sampling(top_k=3), Sampling(top_p=0.5)):
        engine = Generator(backend, vocab_size=size)
        drawn = list(engine.generate(prompt, rule=rule, seed=seed, max_tokens=5, logprobs=True))
        assert all(0 <= d.token < size for d in drawn)
        assert all(np.isfinite(d.logprob) for d in drawn)


def test_padding_takes_no_probability_and_may_hold_anything():
    row = np.concatenate([np.zeros(V - 2), [np.nan, np.inf]])
    engine = Generator(Scripted(lambda _: row), vocab_size=V - 2)
    [drawn] = engine.generate([1], rule=FREE, max_tokens=1, logprobs=True)
    assert drawn.logprob == pytest.approx(-np.log(V - 2))


def test_logprobs_are_the_models_own_before_temperature_and_filters():
    backend = Scripted()
    rule = Sampling(temperature=0.5, top_k=4, min_p=0.1)
    drawn = list(Generator(backend).generate([3, 4], rule=rule, max_tokens=6, logprobs=True))
    tokens = [3, 4]
    for d in drawn:
        expected = log_softmax(np.asarray(backend.noise(tokens), np.float32))[d.token]
        assert d.logprob == pytest.approx(expected)
        tokens.append(d.token)


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


def test_an_answer_can_be_taken_up_anywhere():
    whole = ids(Generator(Scripted()).generate([1, 2], rule=FREE, seed=3, max_tokens=8))
    for n in range(8):
        rest = Generator(Scripted()).generate([1, 2, *whole[:n]], rule=FREE, seed=3, max_tokens=8)
        assert ids(rest)[: 8 - n] == whole[n:]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused_before_anything_runs(seed):
    with pytest.raises(ValueError, match="seed"):
        Generator(Scripted()).generate([1], seed=seed)


@pytest.mark.parametrize(
    "rule",
    [Sampling(temperature=0.0), FREE, Sampling(temperature=0.7, top_k=8, top_p=0.9, min_p=0.02)],
    ids=["greedy", "free", "filtered"],
)
def test_a_seed_means_the_same_on_every_backend(reference, torch_room, rule):
    for seed in range(2):
        answers = [
            ids(Generator(b).generate([5, 6, 7], rule=rule, seed=seed, max_tokens=16))
            for b in (reference, torch_room)
        ]
        assert answers[0] == answers[1]


# --- what is computed, and what is not


@pytest.mark.parametrize("step", [1, 3, 8, 64])
def test_chunks_never_change_the_answer(reference, step):
    prompt = np.random.default_rng(0).integers(0, 64, 21).tolist()
    whole = list(Generator(reference).generate(prompt, max_tokens=8, logprobs=True))
    cut = list(Generator(reference, step_tokens=step).generate(prompt, max_tokens=8, logprobs=True))
    assert ids(cut) == ids(whole)
    np.testing.assert_allclose([d.logprob for d in cut], [d.logprob for d in whole], rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.integers(0, 20)), min_size=1, max_size=5), st.booleans())
def test_a_shared_prefix_never_changes_the_answer(calls, forgetful):
    backend = Scripted(window=4 if forgetful else None)
    engine, before = Generator(backend, step_tokens=7), []
    for prompt, shared in calls:
        prompt = [*before[:shared], *prompt][:40]
        fresh = ids(Generator(Scripted()).generate(prompt, rule=FREE, seed=1, max_tokens=9))
        assert ids(engine.generate(prompt, rule=FREE, seed=1, max_tokens=9)) == fresh
        before = prompt + fresh
    assert all(new <= 7 for _, new in backend.steps)


def test_a_longer_conversation_costs_its_new_tokens_only():
    backend = Scripted()
    engine = Generator(backend)
    answer = ids(engine.generate([1, 2, 3, 4], max_tokens=3))
    assert engine.reused == 0
    del backend.steps[:]
    list(engine.generate([1, 2, 3, 4, *answer, 8, 9], max_tokens=1))
    assert engine.reused == 6  # the last token drawn had not been fed
    assert backend.steps == [(6, 3)]


def test_the_same_prompt_again_computes_its_last_token_only():
    backend = Scripted()
    engine = Generator(backend)
    first = ids(engine.generate([1, 2, 3], max_tokens=2))
    del backend.steps[:]
    assert ids(engine.generate([1, 2, 3], max_tokens=2)) == first
    assert backend.steps[0] == (2, 1)


def test_answers_read_in_turns_do_not_disturb_each_other():
    engine = Generator(Scripted())
    alone = [ids(engine.generate(p, rule=FREE, max_tokens=6)) for p in ([1, 2], [1, 3, 4])]
    a, b = (engine.generate(p, rule=FREE, max_tokens=6) for p in ([1, 2], [1, 3, 4]))
    pairs = list(zip(a, b, strict=True))
    assert [[x.token for x, _ in pairs], [y.token for _, y in pairs]] == alone


@pytest.mark.parametrize("where", [1, 3, 5, 6])
def test_an_interrupted_step_leaves_an_engine_that_answers_right(where):
    prompt, whole = [1, 2, 3, 4], ids(Generator(Scripted()).generate([1, 2, 3, 4], max_tokens=4))
    engine = Generator(Scripted(fail_at=where), step_tokens=2)
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(prompt, max_tokens=4))
    assert ids(engine.generate(prompt, max_tokens=4)) == whole


def test_logits_are_those_after_each_token(reference):
    tokens = list(range(11))
    engine = Generator(reference, step_tokens=4)
    list(engine.generate([9, 9], max_tokens=2))
    logits = engine.logits(tokens)
    assert logits.shape == (11, 64) and logits.dtype == np.float32
    for n in (1, 6, 11):
        np.testing.assert_allclose(
            Generator(reference).logits(tokens[:n])[-1], logits[n - 1], atol=1e-4
        )
    assert int(logits[-1].argmax()) == ids(engine.generate(tokens, max_tokens=1))[0]


# --- limits and errors


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_said_in_a_sentence(bad):
    row = np.zeros(V)
    row[17] = bad
    engine = Generator(Scripted(lambda tokens: row if len(tokens) > 3 else np.zeros(V)))
    for ask in (lambda: list(engine.generate([1, 2])), lambda: engine.logits([1] * 6)):
        with pytest.raises(GptOssError, match="NaN or infinity.*inspect --check"):
            ask()


def test_a_row_ends_where_the_room_does():
    engine = Generator(Scripted(), max_tokens=10)
    assert len(ids(engine.generate([1] * 7))) == 4  # the fourth is drawn, not fed
    assert len(ids(engine.generate([1] * 10))) == 1
    assert len(ids(engine.generate([1] * 7, max_tokens=2))) == 2


def test_a_prompt_beyond_the_context_names_both_numbers():
    with pytest.raises(ContextExceeded, match=rf"{ROOM + 1} tokens.*context of {ROOM}"):
        Generator(Scripted()).generate([1] * (ROOM + 1))
    with pytest.raises(ContextExceeded, match=rf"11 tokens.*10 there is room.*context is {ROOM}"):
        Generator(Scripted(), max_tokens=10).generate([1] * 11)


@pytest.mark.parametrize(
    "prompt, said", [([], "empty"), ([1, V], f"token {V}"), ([-1], "token -1")]
)
def test_a_prompt_that_no_model_can_read_is_refused_at_once(prompt, said):
    with pytest.raises(ValueError, match=said):
        Generator(Scripted()).generate(prompt)
    with pytest.raises(ValueError, match=said):
        Generator(Scripted()).logits(prompt)


@pytest.mark.parametrize(
    "wrong", [{"vocab_size": 0}, {"vocab_size": V + 1}, {"max_tokens": 0}, {"step_tokens": 0}]
)
def test_an_engine_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Generator(Scripted(), **wrong)


def test_no_tokens_at_all_is_a_wrong_limit():
    with pytest.raises(ValueError, match="max_tokens"):
        Generator(Scripted()).generate([1], max_tokens=0)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_is_the_longest_shared_beginning(a, b):
    n = common(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])
