"""Answers come from the weights that are trained, and the trainer gives them the same odds."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from gptoss.llm.llm import conversation  # noqa: E402
from gptoss.text import harmony  # noqa: E402
from gptoss.text.messages import Message  # noqa: E402
from gptoss.train.batch import IGNORE, collate  # noqa: E402
from gptoss.train.policy import Policy  # noqa: E402
from gptoss.train.reward import Rewards  # noqa: E402
from gptoss.train.rollout import Sampler, prompt  # noqa: E402
from tests.train.coin import CONFIG, ROLLOUTS, TOKENIZER, coin, yes  # noqa: E402

ASK = {"messages": [{"role": "user", "content": "Shall I?"}], "answer": "yes"}


@pytest.fixture
def model(parameters):
    return coin(parameters)


@pytest.fixture
def asked():
    return prompt(ASK, TOKENIZER, "a.jsonl line 1", room=2048)


@torch.no_grad()
def scored(model, answers):
    """float32 [W], what the trainer thinks of each token, and what the sampler thought."""
    [batch] = collate([[a.document for a in answers]])
    assert batch.targets.tolist() == [token for a in answers for token in a.tokens]
    now = Policy(model, TOKENIZER.vocab_size, CONFIG).score(batch)
    return now, torch.tensor([logprob for a in answers for logprob in a.logprobs])


def sampler(model, rewards=(yes,), **changed):
    return Sampler(model, TOKENIZER, Rewards(rewards), replace(ROLLOUTS, **changed))


def test_a_prompt_reads_as_the_model_is_asked(asked):
    assert asked.tokens == harmony.render_for_completion(conversation("Shall I?"), TOKENIZER)
    assert asked.example == ASK
    thoughtful = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "channel": "analysis", "content": "easy"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]
    later = prompt({"messages": thoughtful}, TOKENIZER, "", room=2048)
    assert "easy" not in TOKENIZER.decode(later.tokens)


@pytest.mark.parametrize(
    "raw, message",
    [
        ([], "expected a JSON object, found list"),
        ({"messages": ASK["messages"], "solution": 3}, "'solution' is none of answer, messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "must not be the model's"),
        (ASK | {"instructions": "x " * 3000}, "an answer needs room within 2048"),
    ],
)
def test_what_is_no_prompt_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        prompt(raw, TOKENIZER, "", room=2048)


def test_answers_are_judged_and_their_odds_are_the_trainers(model, asked):
    """What was drawn is scored by the trainer's own call, in another shape, on the same weights."""
    raw = {"messages": [{"role": "user", "content": "Yes or no?"}]}
    other = prompt(raw, TOKENIZER, "line 2", room=2048)
    draws = sampler(model)
    answers = draws.draw([asked, other], seed=5)
    assert [a.prompt.origin for a in answers] == ["a.jsonl line 1"] * 8 + ["line 2"] * 8
    assert {a.reward for a in answers} == {0.0, 1.0}
    for a in answers:
        said = "".join(m.content for m in a.messages if m.channel == "final")
        assert a.reward == float(said == "yes" and not a.truncated)
        assert a.truncated == (a.tokens[-1] not in draws.stops)
    now, drawn = scored(model, answers)
    assert float((now - drawn).abs().max()) < 1e-5


def test_the_same_seed_draws_the_same_and_another_does_not(model, asked):
    found = [[a.tokens for a in sampler(model).draw([asked], seed)] for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


def test_the_weights_are_the_trained_ones_at_once(model, asked):
    draws = sampler(model, group=1)
    before = draws.draw([asked], 0, greedy=True)[0]
    with torch.no_grad():
        model.unembedding.weight[TOKENIZER.special("<|return|>")] = 0.0
        model.norm.scale.mul_(-1)
    after = draws.draw([asked], 0, greedy=True)[0]
    assert before.tokens != after.tokens
    now, drawn = scored(model, [after])
    assert torch.allclose(now, drawn, atol=1e-4)


def test_words_that_nobody_has_are_never_drawn_nor_counted(model, asked):
    """Padding at the end of the vocabulary takes no probability from what can be drawn."""
    with torch.no_grad():
        model.unembedding.weight[TOKENIZER.vocab_size :] = 100.0
    answers = sampler(model).draw([asked], 1)
    assert max(t for a in answers for t in a.tokens) < TOKENIZER.vocab_size
    now, drawn = scored(model, answers)
    assert float((now - drawn).abs().max()) < 1e-5


def test_what_was_cut_off_has_its_own_reward(model, asked):
    def never(*_):
        raise AssertionError("nobody is asked about half an answer")

    for answer in sampler(model, [never], max_tokens=2, truncated=-0.5).draw([asked], 0):
        assert answer.truncated and len(answer.tokens) == 2
        assert answer.reward == -0.5 and answer.parts == {"never": 0.0}


def test_only_the_answer_is_learned(model, asked):
    document = sampler(model).draw([asked], 0)[0].document
    n = len(asked.tokens) - 1
    assert document.tokens[: n + 1] == asked.tokens
    assert document.targets[:n] == [IGNORE] * n
    assert document.targets[n:-1] == document.tokens[n + 1 :]


def test_a_call_ends_an_answer(model):
    tools = [{"name": "look", "parameters": {"type": "object", "properties": {}}}]
    asked = prompt(ASK | {"tools": tools}, TOKENIZER, "", room=2048)
    assert {TOKENIZER.special(f"<|{n}|>") for n in ("call", "return")} <= sampler(model).stops
    assert asked.messages[1].role == "developer" and isinstance(asked.messages[-1], Message)
