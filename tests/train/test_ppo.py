"""PPO: its numbers against plain loops, its first ratio, and that it learns and goes on."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402

from gptoss.train.objective import Ppo  # noqa: E402
from gptoss.train.policy import Minibatch  # noqa: E402
from gptoss.train.ppo import Proximal, explained, gae, steered  # noqa: E402
from gptoss.train.rollout import Answer  # noqa: E402
from gptoss.train.value import ValueHead  # noqa: E402
from tests.train.coin import CONFIG, ROLLOUTS, improved, interrupted, play, told  # noqa: E402

TWICE = replace(ROLLOUTS, minibatches=2, epochs=2)


def recipe(**numbers):
    return Proximal(Ppo(**numbers))


def test_gae_is_the_sum_it_is_defined_as():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=9), rng.normal(size=9)
    found = gae(torch.tensor(rewards), torch.tensor(values), 0.9, 0.8)
    after = np.append(values, 0.0)
    for t in range(9):
        surprises = [rewards[s] + 0.9 * after[s + 1] - after[s] for s in range(t, 9)]
        expected = sum((0.9 * 0.8) ** i * x for i, x in enumerate(surprises))
        assert float(found[t]) == pytest.approx(expected)


def test_gae_by_hand():
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.25, 0.75])
    assert gae(rewards, values, 1.0, 1.0).tolist() == [0.5, 0.75, 0.25]
    assert gae(rewards, values, 1.0, 0.0).tolist() == [-0.25, 0.5, 0.25]


def test_a_value_head_finds_what_is_linear():
    """From too few outcomes too; and what it saw last counts most."""
    rng = torch.Generator().manual_seed(0)
    x, slope = torch.randn(400, 32, generator=rng), torch.randn(32, generator=rng)
    head = ValueHead.new(32)
    assert not head(x).any()
    assert head.after(x, torch.ones(400))(x).tolist() == pytest.approx([1.0] * 400)
    learned = head.after(x[:200], x[:200] @ slope + 3.0)
    assert explained(learned(x[200:]), x[200:] @ slope + 3.0) > 0.95
    assert explained(head.after(x[:8], x[:8] @ slope)(x), x @ slope) > 0
    for _ in range(8):
        learned = learned.after(x[:200], -(x[:200] @ slope))
    assert explained(learned(x), -(x @ slope)) > 0.95
    assert torch.equal(ValueHead(**learned.packed())(x), learned(x))


def advised(recipe, rewards, memory):
    """The advantages of a round of answers of three tokens."""
    answers = [Answer(None, [1, 2, 3], [], False, [], reward, {}) for reward in rewards]
    states = torch.randn(3 * len(rewards), 4, generator=torch.Generator().manual_seed(0))
    known = {"old": torch.zeros(len(states)), "states": states}
    one = Minibatch(None, list(range(len(rewards))), known, {})
    metrics = recipe.advise(answers, [[one]], memory)
    assert set(one.known) == {"old", "advantage"}  # states are not kept
    return one.known["advantage"].view(-1, 3), metrics


def test_a_reward_counts_for_every_token_of_its_answer():
    """However far it is from the end: nothing is known yet, and the mean is what is expected."""
    found, metrics = advised(recipe(), [1.0, 0.0, 0.0, 1.0], {})
    assert found.tolist() == [[1.0] * 3, [-1.0] * 3, [-1.0] * 3, [1.0] * 3]
    assert metrics == {"explained": 0.0, "deviation": 0.5}
    decayed, _ = advised(recipe(lam=0.5), [1.0, 0.0, 0.0, 1.0], {})
    assert decayed[0, 0] < 0.1 * decayed[0, 2]


def test_a_round_without_a_signal_is_not_blown_up():
    memory = {}
    advised(recipe(), [1.0, 0.0, 0.0, 1.0], memory)
    found, metrics = advised(recipe(), [1.0, 1.0, 1.0, 0.99], memory)
    assert float(found.std(correction=0)) == pytest.approx(metrics["deviation"] / 0.5)
    assert not advised(recipe(), [0.1] * 4, {})[0].abs().max() > 0.1  # rounding, at most


def test_the_weight_of_the_divergence_is_steered_gently():
    assert steered(0.1, 2.0, 1.0) == pytest.approx(0.102)  # at most a fiftieth a round
    assert steered(0.1, 1.1, 1.0) == pytest.approx(0.101)
    assert steered(0.1, 0.0, 1.0) == pytest.approx(0.098)


def test_it_learns_and_its_first_ratios_are_exactly_one(parameters, tmp_path):
    rows, model = play(parameters, tmp_path, recipe(), config=replace(CONFIG, steps=12))
    assert improved(rows)
    assert {row["ratio"] for row in rows} == {0.0}
    assert rows[0]["explained"] == pytest.approx(0.0, abs=1e-6)  # a head that knows nothing yet
    assert max(row["explained"] for row in rows[1:4]) > 0.2
    assert set(model.state_dict()) == set(parameters)  # and is no part of the model


def test_a_reward_lost_to_divergence_holds_the_policy_back(parameters, tmp_path):
    held, free = (
        play(parameters, tmp_path / str(kl), recipe(kl=kl), config=replace(CONFIG, steps=6))[0]
        for kl in (5.0, 1e-6)
    )
    assert held[-1]["kl_answer"] < 0.5 * free[-1]["kl_answer"]


def test_an_interrupted_run_goes_on_to_the_bit(parameters, tmp_path):
    """The steered weight and the values of a round that has begun included."""
    numbers, longer = {"kl": 0.1, "kl_target": 0.01}, replace(CONFIG, steps=6)
    whole, model = play(
        parameters, tmp_path / "whole", recipe(**numbers), config=longer, rollouts=TWICE
    )
    weights = [row["kl_weight"] for row in whole]
    assert weights[0] == weights[3] == 0.1 != weights[4]  # a round is four steps
    arguments = (parameters, tmp_path / "cut", recipe(**numbers))
    interrupted(lambda: play(*arguments, config=longer, rollouts=TWICE), 5, saved=False)
    rows, other = play(
        parameters, tmp_path / "cut", recipe(**numbers), config=longer, rollouts=TWICE
    )
    assert told(rows) == told(whole)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
