"""The model inside the package does what its card says, on problems its training never saw."""

import random

import pytest

from gptoss import LLM
from runs.nano import tasks, vocabulary
from runs.nano.evaluate import solve

PROMISED = 0.95  # exact answers of each task, over all efforts
FLOOR = 0.85  # the same of few problems, whose share is noise besides


@pytest.fixture(scope="module")
def llm():
    llm = LLM.load("nano")
    tasks.KNOWN[:] = vocabulary.known(llm.tokenizer)
    return llm


def exam(task, count, seed=1, effort=None):
    rng = random.Random(f"{task} {seed}")
    return [tasks.example(rng, task=task, effort=effort, exam=True) for _ in range(count)]


def wrong(llm, examples):
    """The questions, with their tasks, that are not answered exactly."""
    return [(e.task, e.prompt[-1].content) for e in examples if not solve(llm, e)[0]]


@pytest.mark.parametrize("task", tasks.SHARES)
def test_held_out_problems(llm, task):
    assert len(missed := wrong(llm, exam(task, 24))) <= (1 - FLOOR) * 24, missed


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.SHARES)
def test_what_the_card_promises(llm, task):
    examples = [e for effort in tasks.EFFORTS for e in exam(task, 100, effort=effort)]
    assert len(missed := wrong(llm, examples)) <= (1 - PROMISED) * len(examples), missed


QUESTIONS = ("What is 247 + 385?", "Reverse the word planet.", "Sort 7 3 9 1")


@pytest.mark.parametrize("question", QUESTIONS)
def test_effort_shows_in_the_length_of_the_analysis(llm, question):
    low, medium, high = (
        len(llm.chat(question, effort=effort, temperature=0.0).analysis) for effort in tasks.EFFORTS
    )
    assert 0 < 1.2 * low < medium and 1.2 * medium < high, (low, medium, high)


def test_a_tool_is_called_and_its_answer_used(llm):
    talk = [{"role": "user", "content": "What is the weather in Paris?"}]
    call = llm.chat(talk, tools=[tasks.WEATHER], temperature=0.0)
    assert call.finish_reason == "tool_calls"
    assert [m.recipient for m in call.tool_calls] == ["functions.get_weather"]
    assert call.tool_calls[0].content == '{"city": "Paris"}'
    assert call.tool_calls[0].content_type == "json"
    result = {
        "role": "tool",
        "name": "functions.get_weather",
        "content": '{"degrees": 21, "sky": "sunny"}',
    }
    answer = llm.chat([*talk, *call.messages, result], tools=[tasks.WEATHER], temperature=0.0)
    assert answer.text == "It is 21 degrees and sunny in Paris."


def test_without_a_tool_it_says_so(llm):
    reply = llm.chat("What is the weather in Paris?", temperature=0.0)
    assert not reply.tool_calls and "too small" in reply.text


def test_many_turns(llm):
    talk = []
    for question, answer in [("12 + 30", "42"), ("100 - 1", "99"), ("250 + 250", "500")]:
        talk.append({"role": "user", "content": question})
        reply = llm.chat(talk, temperature=0.0)
        assert answer in reply.text
        talk += reply.messages


def test_it_is_the_published_layout_and_small():
    from gptoss.checkpoint.open import open_checkpoint
    from gptoss.llm.models import resolve

    checkpoint = open_checkpoint(resolve("nano"))
    assert checkpoint.layout.name == "huggingface"
    assert sum(f.stat().st_size for f in checkpoint.path.iterdir()) < 8_000_000


def test_a_grown_model_computes_the_same(tmp_path, llm):
    pytest.importorskip("torch")
    from gptoss.llm.models import resolve
    from runs.nano.grow import grow

    grow(resolve("nano"), tmp_path / "grown", layers=6)
    grown = LLM.load(tmp_path / "grown", backend="reference")
    assert grown.config.num_hidden_layers == 6
    tokens = llm.tokenizer.encode("What is 247 + 385?")
    same = LLM.load("nano", backend="reference").logits(tokens)
    assert abs(grown.logits(tokens) - same).max() < 1e-4  # packed or not, sums round differently


def test_questions_for_rewards_are_prompts_and_none_is_held_out(llm):
    pytest.importorskip("torch")
    from gptoss.text import harmony
    from gptoss.train.rollout import prompt
    from runs.nano import prompts

    rng = random.Random(5)
    for _ in range(50):
        task = rng.choice(list(prompts.SHARES))
        example = tasks.example(rng, task=task)
        assert task in tasks.SEEN_IN_TRAINING or not tasks.held_out(example.key)
        read = prompt(prompts.line(example), llm.tokenizer, "", room=1000)
        whole = harmony.render_for_completion(example.prompt, llm.tokenizer, keep_analysis=True)
        assert read.tokens == whole
