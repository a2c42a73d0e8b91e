"""GRPO: its numbers by hand, its first ratio, its rounds, and that it learns and goes on."""

import pytest

torch = pytest.importorskip("torch")

import json  # noqa: E402
from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402

from gptoss.backends.torch.modules import ModuleOps  # noqa: E402
from gptoss.cli.main import main  # noqa: E402
from gptoss.errors import TrainingError  # noqa: E402
from gptoss.train.grpo import GroupRelative, advantages, grpo  # noqa: E402
from gptoss.train.objective import Grpo, Rollouts  # noqa: E402
from gptoss.train.policy import Policy, clipped, divergence, ratios  # noqa: E402
from gptoss.train.reinforce import prompts_of  # noqa: E402
from gptoss.train.reward import Rewards  # noqa: E402
from gptoss.train.rollout import Sampler  # noqa: E402
from gptoss.train.rounds import Rounds  # noqa: E402
from tests.train.coin import (  # noqa: E402
    CONFIG,
    NUMBERS,
    ROLLOUTS,
    TOKENIZER,
    coin,
    improved,
    interrupted,
    play,
    told,
    written,
    yes,
)

TWICE = replace(ROLLOUTS, minibatches=2, epochs=2)


def recipe(**numbers):
    return GroupRelative(Grpo(**numbers), ROLLOUTS.group)


def never(*_):
    return 0.0


def rounds(parameters, path, rewards=(yes,), rollouts=ROLLOUTS, model=None, **numbers):
    """Rounds that no trainer asks for."""
    model = model or coin(parameters)
    words = TOKENIZER.vocab_size
    corpus = prompts_of([written(path / "prompts.jsonl")], TOKENIZER, 2048)
    sampler = Sampler(model, TOKENIZER, Rewards(rewards), rollouts)
    reference = coin(parameters) if numbers.get("kl") else None
    policy = Policy(model, words, CONFIG)
    return Rounds(recipe(**numbers), policy, sampler, corpus, rollouts, reference)


def test_advantages_by_hand():
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]))
    r3 = 3**0.5
    assert found[0].tolist() == pytest.approx([r3, -1 / r3, -1 / r3, -1 / r3])
    assert found[1].tolist() == [0.0] * 4
    plain = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), unscaled=True)
    assert plain[0].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_the_clipped_loss_is_the_definition_token_by_token():
    rng = np.random.default_rng(0)
    now, old, better = (rng.normal(size=200) for _ in range(3))
    found = clipped(*map(torch.tensor, (now, old, better)), 0.2, 0.3)
    said = ratios(*map(torch.tensor, (now, old, better)), 0.2, 0.3)
    for i in range(200):
        ratio = np.exp(now[i] - old[i])
        held = min(max(ratio, 0.8), 1.3)
        assert float(found[i]) == pytest.approx(-min(ratio * better[i], held * better[i]))
        # Clipped is what gives no gradient.
        flat = (better[i] > 0 and ratio > 1.3) or (better[i] < 0 and ratio < 0.8)
        assert bool(said["clipped"][i]) == flat
        assert float(said["ratio"][i]) == pytest.approx(abs(ratio - 1))
    assert 0 < float(said["clipped"].mean()) < 1


def test_divergence_by_hand():
    now, reference = torch.tensor([0.0, -1.0, -1.0]), torch.tensor([0.0, -2.0, -0.5])
    expected = [0.0, np.exp(-1.0) + 1 - 1, np.exp(0.5) - 0.5 - 1]
    assert divergence(now, reference).tolist() == pytest.approx(expected)
    # Its mean over what is drawn is the divergence: sum p log(p / q).
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    mean = float((torch.tensor(p) * divergence(torch.tensor(p).log(), torch.tensor(q).log())).sum())
    assert mean == pytest.approx(float((p * np.log(p / q)).sum()))


def test_gradients_are_those_of_the_definition(parameters, tmp_path):
    """In float64, through plain logits: no chunks, no autograd function of our own."""
    run = rounds(parameters, tmp_path, kl=0.3)
    [minibatch], _ = run.draw(None)
    run.policy.model.unembedding.weight.data.add_(0.02 * torch.randn(512, 32))  # ratios move
    run.loss(minibatch)[0].backward()
    found = {n: p.grad for n, p in run.policy.model.named_parameters()}

    model, batch, known = run.policy.model.double(), minibatch.batch, minibatch.known
    model.zero_grad()
    logits = model(batch.tokens, lengths=batch.lengths, wanted=batch.wanted)
    logits = logits[:, : TOKENIZER.vocab_size]
    now = logits.log_softmax(-1)[torch.arange(len(logits)), batch.targets]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(now)):
        ratio = (now[i] - known["old"][i]).exp()
        better, apart = known["advantage"][i], known["reference"][i] - now[i]
        surrogate = torch.min(ratio * better, ratio.clamp(0.8, 1.28) * better)
        total = total - surrogate + 0.3 * (apart.exp() - apart - 1)
    (total / len(now)).backward()
    for name, p in model.named_parameters():
        scale = float(p.grad.abs().max())
        assert float((found[name] - p.grad).abs().max()) <= 1e-4 * scale + 1e-7, name


@pytest.mark.parametrize("rollouts", [ROLLOUTS, replace(ROLLOUTS, tokens=400)])
def test_a_rounds_first_ratios_are_exactly_one(parameters, tmp_path, rollouts):
    """The same call on the same batch, with and without gradients: not one bit may differ."""
    rows, _ = play(parameters, tmp_path, recipe(), rollouts=rollouts)
    assert {row["ratio"] for row in rows if "ratio" in row} == {0.0}
    assert all(row["gap_most"] < 1e-4 for row in rows if "ratio" in row)
    assert any(row["gap"] > 0.0 for row in rows if "ratio" in row)  # it does measure


def test_what_is_scored_is_computed_by_products_of_the_same_shapes_as_what_is_learned(
    parameters, tmp_path
):
    """Or that first ratios are 1 would be luck."""
    run, shapes = rounds(parameters, tmp_path), []

    class Watched(ModuleOps):
        def experts(self, x, *rest):
            shapes.append(x.shape)
            return super().experts(x, *rest)

    run.policy.model.ops = Watched()
    [minibatch], _ = run.draw(None)
    scored = shapes[-NUMBERS.num_hidden_layers :]
    shapes.clear()
    run.loss(minibatch)
    assert shapes == scored


def test_later_updates_of_a_round_move_away_from_it(parameters, tmp_path):
    rows, _ = play(parameters, tmp_path, recipe(), config=replace(CONFIG, steps=4), rollouts=TWICE)
    first, second, again, last = (row["ratio"] for row in rows)
    assert first == 0.0
    assert min(second, again, last) > 0.0
    assert len({row["reward"] for row in rows}) == 1


def test_it_learns(parameters, tmp_path):
    rows, _ = play(parameters, tmp_path, recipe(kl=0.01), config=replace(CONFIG, steps=12))
    assert improved(rows)
    assert rows[0]["kl"] == 0.0 < max(row.get("kl", 0.0) for row in rows)


def test_an_interrupted_run_goes_on_to_the_bit(parameters, tmp_path):
    """Within a round, whose answers are kept in the checkpoint."""
    whole, model = play(parameters, tmp_path / "whole", recipe(kl=0.1), rollouts=TWICE)
    interrupted(lambda: play(parameters, tmp_path / "cut", recipe(kl=0.1), rollouts=TWICE), 1)
    rows, other = play(parameters, tmp_path / "cut", recipe(kl=0.1), rollouts=TWICE)
    assert told(rows) == told(whole)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_groups_without_signal_are_left_out_and_others_drawn(parameters, tmp_path):
    """A prompt that is never right takes no part; others come in its place, if that is allowed."""

    def picky(prompt, reply, messages, example):
        return float(reply == "yes") if prompt[-1].content != "Choose." else 0.0

    learned = []
    for attempts in (1, 6):
        run = rounds(parameters, tmp_path, [picky], attempts=attempts)
        steps, at = [], None
        for _ in range(3):
            [minibatch], at = run.draw(at)
            steps.append(minibatch)
        learned.append(sum(len(m.rows) for m in steps))
        for m in steps:
            if m.batch is not None:
                assert len(m.rows) in (8, 16)
                assert bool((m.known["advantage"] != 0).all())
                asked = TOKENIZER.decode(m.batch.tokens.tolist())
                assert "Choose." not in asked and asked.count("<|start|>user") == len(m.rows)
    assert learned[0] < learned[1] <= 48


def test_a_round_without_any_signal_changes_nothing(parameters, tmp_path):
    rows, model = play(parameters, tmp_path, recipe(), [never], config=replace(CONFIG, steps=2))
    assert [row["signal"] for row in rows] == [0.0, 0.0]
    assert [row["norm"] for row in rows] == [0.0, 0.0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, parameters[name]), name


@pytest.mark.parametrize("skip", [False, True])
def test_what_was_cut_off_can_be_left_out(parameters, tmp_path, skip):
    run = rounds(parameters, tmp_path, rollouts=replace(ROLLOUTS, skip_truncated=skip))
    answers = run.sampler.draw([run._prompt(0)], seed=0)
    answers = [replace(answer, truncated=i % 4 == 1) for i, answer in enumerate(answers)]
    [[minibatch]] = run._steps(answers)
    assert sorted(minibatch.rows) == ([0, 2, 3, 4, 6, 7] if skip else [*range(8)])
    assert len(minibatch.known["old"]) == sum(len(answers[row].tokens) for row in minibatch.rows)


def test_a_reward_that_raises_costs_nothing(parameters, tmp_path):
    """One sentence; what was trained until then is kept, and the mended run is the whole run."""
    judged = []

    def yes(prompt, reply, messages, example):
        judged.append(reply)
        return float(reply == "yes") if len(judged) < 40 else 1 / 0

    with pytest.raises(TrainingError, match=r"prompts.jsonl line \d: the reward yes raised Zero"):
        play(parameters, tmp_path / "cut", recipe(), [yes])
    assert [p.name for p in (tmp_path / "cut" / "run" / "states").iterdir()] == ["00000002"]
    judged = [""] * -1000
    mended, _ = play(parameters, tmp_path / "cut", recipe(), [globals()["yes"]])
    whole, _ = play(parameters, tmp_path / "whole", recipe())
    assert told(mended) == told(whole)


def test_a_sampler_that_is_not_the_trainer_is_refused(parameters, tmp_path):
    run = rounds(parameters, tmp_path)
    run.policy.model = coin(parameters)
    with torch.no_grad():
        run.policy.model.unembedding.weight.mul_(1.1)
    with pytest.raises(TrainingError, match="have the same weights, but their log-prob.* differ"):
        run.draw(None)


@pytest.fixture
def command(monkeypatch, capsys):
    """A command line, in this process: its status and what it complained of."""

    def run(line):
        monkeypatch.setattr("sys.argv", ["gptoss", *line.split()])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr().err

    return run


def test_the_command_trains_and_goes_on(tmp_path, command):
    """By name, from the packaged model, its experts adapted while they stay packed."""
    lines = [{"messages": [{"role": "user", "content": "1+1"}], "answer": "1 + 1 = 2"}]
    data = written(tmp_path / "sums.jsonl", lines)
    line = f"train grpo nano {data} --out {tmp_path / 'run'} --reward exact --reward 0.1*brief"
    line += " --prompts 1 --group 2 --max-tokens 40 --lora 2 --steps 1 --threads 1"
    assert command(line)[0] == 0
    assert command(line)[0] == 0
    [row] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert {"reward.exact", "reward.brief", "signal"} <= set(row)
    data.write_text('{"messages": []}\n')
    status, said = command(line.replace("/run ", "/other "))
    assert status == 1 and "sums.jsonl line 1: messages: expected a list" in said


def test_going_on_with_other_weights_is_refused(parameters, tmp_path):
    play(parameters, tmp_path, recipe(), ["2*format"], config=replace(CONFIG, steps=1))
    with pytest.raises(TrainingError, match=r"was begun with rewards \['2\*format'\], not"):
        play(parameters, tmp_path, recipe(), ["3*format"], config=replace(CONFIG, steps=1))


def test_numbers_out_of_bounds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="group must be at least 1 and at most 128, not 200"):
        Rollouts(group=200)
    with pytest.raises(TrainingError, match="none.jsonl: cannot be read"):
        grpo("nano", [tmp_path / "none.jsonl"], tmp_path / "run", ["exact"])
