"""What a token visited when it was drawn is what it visits when it is learned from."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402

from gptoss.backends import has_native  # noqa: E402
from gptoss.backends.protocol import Batch  # noqa: E402
from gptoss.backends.torch.backend import TorchBackend  # noqa: E402
from gptoss.train.batch import collate  # noqa: E402
from gptoss.train.grpo import GroupRelative  # noqa: E402
from gptoss.train.objective import Grpo  # noqa: E402
from gptoss.train.policy import Minibatch, Policy  # noqa: E402
from gptoss.train.reinforce import prompts_of  # noqa: E402
from gptoss.train.replay import Recorder, rerouted  # noqa: E402
from gptoss.train.reward import Rewards  # noqa: E402
from gptoss.train.rollout import Sampler, prompt  # noqa: E402
from gptoss.train.rounds import Rounds  # noqa: E402
from gptoss.train.routing import Routing  # noqa: E402
from tests.train.coin import (  # noqa: E402
    CONFIG,
    NUMBERS,
    ROLLOUTS,
    TOKENIZER,
    coin,
    interrupted,
    play,
    told,
    written,
    yes,
)

REPLAYED = replace(ROLLOUTS, replay_routing=True)
LAYERS, K = NUMBERS.num_hidden_layers, NUMBERS.experts_per_token


def recipe(**numbers):
    return GroupRelative(Grpo(**numbers), ROLLOUTS.group)


def policy(model, config=CONFIG):
    return Policy(model, TOKENIZER.vocab_size, config)


def draw(model, **changed):
    """Answers to two prompts of other lengths."""
    asked = [
        prompt({"messages": [{"role": "user", "content": c}]}, TOKENIZER, "line", room=2048)
        for c in ("Shall I?", "Yes or no? Say it at once.")
    ]
    sampler = Sampler(model, TOKENIZER, Rewards([yes]), replace(REPLAYED, **changed))
    return sampler.draw(asked, seed=3)


def batch_of(answers):
    [batch] = collate([[a.document for a in answers]])
    return batch, torch.from_numpy(np.concatenate([a.chosen for a in answers]))


def visited(routing):
    """[T, L, k], each token's experts in order of their number."""
    seen = [x for name, x in routing.seen.items() if name.endswith(".chosen")]
    return torch.stack(seen, dim=1).sort().values


@pytest.mark.parametrize("changed", [{}, {"rows": 3}, {"rows": 3, "max_tokens": 1}])
def test_every_token_that_is_read_is_recorded(parameters, changed):
    """In forks, in rows that had to wait, in answers of a single token."""
    model = coin(parameters)
    answers, routing = draw(model, **changed), Routing()
    batch, chosen = batch_of(answers)
    assert chosen.shape == (len(batch.tokens), LAYERS, K)
    policy(model).score(batch, routing)
    assert torch.equal(visited(routing), chosen.long().sort().values)
    assert len(chosen.unique(dim=0)) > 4  # it is not the same for all


def test_what_is_rewound_is_forgotten(parameters):
    recorder = Recorder(TorchBackend.of(coin(parameters)))
    cache = recorder.new_cache(max_tokens=64)
    slot = cache.open()

    def read(slot, tokens, past):
        recorder.forward(Batch.of([tokens], [past], [slot]), cache)

    read(slot, [5, 6, 7, 8], 0)
    child = cache.fork(slot, 3)
    cache.truncate(slot, 2)
    read(slot, [9], 2)
    read(child, [9, 4], 3)
    for each in (slot, child):
        cache.close(each)
    assert sorted(recorder.closed) == [(5, 6, 7, 9, 4), (5, 6, 9)]
    whole = [recorder.chosen(row) for row in sorted(recorder.closed)]
    assert [len(x) for x in whole] == [5, 3]
    assert np.array_equal(whole[0][:2], whole[1][:2])
    assert np.array_equal(recorder.chosen((5, 6, 7)), whole[0][:3])  # the beginning of another
    read(twin := cache.open(), [5, 6, 9], 0)
    cache.close(twin)
    assert recorder.chosen((5, 6, 9)) is not recorder.chosen((5, 6, 9))  # equal rows, each its own


class Told(torch.nn.Module):
    """A router that is told its choice, written out."""

    def __init__(self, gate, chosen):
        super().__init__()
        self.weight, self.bias, self.chosen = gate.weight, gate.bias, chosen

    def forward(self, x):
        scores = x @ self.weight.T + self.bias
        return self.chosen, scores.gather(1, self.chosen).softmax(-1)


@pytest.mark.parametrize("recompute", [False, True])
def test_replayed_experts_are_visited_and_the_router_still_learns(parameters, recompute):
    """Experts that no router would choose, against the definition: numbers and gradients."""
    model, other = coin(parameters), coin(parameters)
    batch, chosen = batch_of(draw(model)[::3])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(len(chosen), LAYERS, NUMBERS.num_experts, generator=generator)
    chosen = chosen.argsort(dim=-1)[..., :K]
    for i, block in enumerate(other.block):
        block.mlp.gate = Told(block.mlp.gate, chosen[:, i])
    expected = policy(other).score(batch, Routing())  # traced: all tokens visit the last layer
    routing = Routing()
    config = replace(CONFIG, recompute=recompute)
    found = policy(model, config).score(batch, routing, chosen.to(torch.int16))
    own = policy(model).score(batch)
    assert torch.equal(visited(routing), chosen.sort().values)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, own, atol=1e-3)  # it matters
    slope = torch.randn(len(found), generator=generator)
    for scored in (found, expected):
        (scored * slope).sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert float((p.grad - q.grad).abs().max()) < 1e-4 * float(q.grad.abs().max()), name
    assert all(bool(block.mlp.gate.weight.grad.any()) for block in model.block)


def test_rerouted_counts_choices_that_differ(parameters):
    model = coin(parameters)
    batch, chosen = batch_of(draw(model)[:2])
    routing = Routing()
    policy(model).score(batch, routing, chosen)
    assert not rerouted(routing).any()
    other = chosen.clone()
    other[4, 1] = (other[4, 1] + 1) % NUMBERS.num_experts
    routing = Routing()
    policy(model).score(batch, routing, other)
    here = rerouted(routing)
    assert here[4] >= 1 / LAYERS and not here[:4].any()


def uneasy(parameters, tmp_path, replay):
    """What a round says, and its step, where the trainer's routers lean another way and experts
    differ."""
    models = coin(parameters), coin(parameters)
    rollouts = replace(ROLLOUTS, replay_routing=replay, gap=9.0)
    with torch.no_grad():
        for model in models:
            for block in model.block:
                block.mlp.experts.mlp1_weight.mul_(8)
                block.mlp.experts.mlp2_weight.mul_(8)
        for block in models[1].block:
            block.mlp.gate.bias[0] += 0.01
    corpus = prompts_of([written(tmp_path / "prompts.jsonl")], TOKENIZER, 2048)
    sampler = Sampler(models[0], TOKENIZER, Rewards([yes]), rollouts)
    run = Rounds(recipe(), policy(models[1]), sampler, corpus, rollouts)
    steps = run._steps(sampler.draw([run._prompt(i) for i in range(3)], seed=0))
    return run._gap(steps), steps[0][0], run


def test_where_routers_disagree_replay_brings_sampler_and_trainer_together(parameters, tmp_path):
    replayed, minibatch, run = uneasy(parameters, tmp_path, True)
    alone, other, _ = uneasy(parameters, tmp_path, False)
    assert other.chosen is None and "rerouted" not in alone
    assert 0.0 < replayed["rerouted"] < 0.5
    assert replayed["gap"] < alone["gap"] / 2
    minibatch.known["advantage"] = torch.ones_like(minibatch.known["old"])
    stored = Minibatch.of(minibatch.packed())  # as a checkpoint holds it
    assert run.loss(stored)[1]["ratio"] == 0.0  # the update replays what the scoring did


def test_it_works_in_bfloat16(parameters, tmp_path):
    config = replace(CONFIG, autocast=True)
    rows, _ = play(parameters, tmp_path, recipe(), rollouts=REPLAYED, config=config)
    assert all(0.0 <= row["rerouted"] < 0.5 and row["gap"] < 0.05 for row in rows)
    assert all(row["ratio"] == 0.0 for row in rows)


def test_an_interrupted_run_goes_on_to_the_bit(parameters, tmp_path):
    """Within a round, whose routing is kept in the checkpoint; and batch-invariant."""
    twice = replace(REPLAYED, minibatches=2, epochs=2, batch_invariant=has_native())
    whole, model = play(parameters, tmp_path / "whole", recipe(), rollouts=twice)
    interrupted(lambda: play(parameters, tmp_path / "cut", recipe(), rollouts=twice), 1)
    rows, other = play(parameters, tmp_path / "cut", recipe(), rollouts=twice)
    assert told(rows) == told(whole) and "rerouted" in rows[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
