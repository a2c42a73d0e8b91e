"""Not one bit between the sampler's numbers and the trainer's; and the gradients of both."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gptoss._core", reason="the compiled core is not built")

from dataclasses import replace  # noqa: E402

from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.errors import BackendUnavailable, TrainingError  # noqa: E402
from gptoss.model.weights import Mixture  # noqa: E402
from gptoss.train import loss, reinforce  # noqa: E402
from gptoss.train.batch import collate  # noqa: E402
from gptoss.train.grpo import GroupRelative  # noqa: E402
from gptoss.train.invariant import InvariantOps, attend, logprobs, make_invariant  # noqa: E402
from gptoss.train.lora import adapt  # noqa: E402
from gptoss.train.objective import Grpo, Ppo  # noqa: E402
from gptoss.train.policy import Policy  # noqa: E402
from gptoss.train.ppo import Proximal  # noqa: E402
from gptoss.train.quantize import quantize  # noqa: E402
from gptoss.train.reinforce import prompts_of  # noqa: E402
from gptoss.train.reward import Rewards  # noqa: E402
from gptoss.train.rollout import Sampler, prompt  # noqa: E402
from gptoss.train.rounds import Rounds  # noqa: E402
from tests.train.coin import (  # noqa: E402
    CONFIG,
    NUMBERS,
    ROLLOUTS,
    TOKENIZER,
    coin,
    play,
    written,
    yes,
)

EXACT = replace(ROLLOUTS, batch_invariant=True)
T, D, F, E, H, K, d = 37, 72, 40, 5, 4, 2, 24  # no whole vectors
LONG = "Yes or no? " + "Say. " * 60


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def experts(ops, x):
    w = Mixture(
        *(None, None, None),
        *(random(E, 2 * F, D), random(E, 2 * F), random(E, D, F), random(E, D)),
    )
    chosen, share = ops.route(x[:, :E].contiguous(), 2)
    return ops.experts(x, w, chosen, share, NUMBERS)


def rope(ops, x):
    """Positions go with their tokens."""
    where = (x[:, 0].abs() * 50).long()
    return ops.rope(x.reshape(-1, 3, D // 3), where, replace(NUMBERS, head_dim=D // 3))


ROWS = {
    "rms_norm": lambda ops, x: ops.rms_norm(x, random(D), 1e-5),
    "linear": lambda ops, x: ops.linear(x, random(50, D), random(50)),
    "rope": rope,
    "experts": experts,
    "share": lambda ops, x: ops.route(x[:, :E].contiguous(), 2)[1],
    "chosen": lambda ops, x: ops.route(x[:, :E].contiguous(), 2)[0],
    "logprobs": lambda ops, x: logprobs(x, random(50, D), x[:, 1].abs().mul(9).long()),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_same_alone_in_company_and_elsewhere(name):
    compute, ops, x = ROWS[name], InvariantOps(), random(T, D)
    whole = compute(ops, x)
    for start, stop in ((0, 1), (5, 6), (3, 20), (36, 37)):
        assert torch.equal(compute(ops, x[start:stop]), whole[start:stop])
    assert torch.equal(compute(ops, x.flip(0)), whole.flip(0))
    assert torch.equal(compute(ops, x.clone().requires_grad_()), whole)


@pytest.mark.parametrize("window", [None, 7])
def test_a_query_is_the_same_however_long_its_row_becomes(window):
    q, k, v, sinks = random(3, H, 150, d), random(3, K, 150, d), random(3, K, 150, d), random(H)
    whole = attend(q, k, v, sinks, window)
    for b, n in ((0, 1), (1, 8), (2, 129), (1, 150)):
        alone = attend(*(x[b : b + 1, :, :n] for x in (q, k, v)), sinks, window)
        assert torch.equal(alone[0], whole[b, :, :n])


def invariant(parameters):
    """A model, and the backend that draws from it."""
    model = coin(parameters)
    return model, make_invariant(model, CONFIG)


def drawn(model, backend, rollouts=EXACT):
    """Answers to a short prompt and to one of several pages."""
    said = ({"messages": [{"role": "user", "content": c}]} for c in ("Shall I?", LONG))
    asked = [prompt(raw, TOKENIZER, "line", room=2048) for raw in said]
    sampler = Sampler(model, TOKENIZER, Rewards([yes]), rollouts, backend=backend)
    return sampler.draw(asked, seed=5)


def packed(answers):
    [batch] = collate([[a.document for a in answers]])
    return batch, torch.tensor([logprob for a in answers for logprob in a.logprobs])


@pytest.mark.parametrize("rollouts", [EXACT, replace(EXACT, rows=3)])
def test_the_trainers_numbers_are_the_samplers(parameters, rollouts):
    """Decoded token by token from forked caches, past the window; and packed, in any order."""
    model, backend = invariant(parameters)
    answers = drawn(model, backend, rollouts)
    assert len({len(a.tokens) for a in answers}) > 1 and len(answers[-1].prompt.tokens) > 256
    policy = Policy(model, TOKENIZER.vocab_size, CONFIG, logprobs=logprobs)
    mixed = [answers[i * 7 % 16] for i in range(16)]
    for some in (answers, mixed, answers[3:4], mixed[5:8]):
        batch, sampled = packed(some)
        assert torch.equal(policy.score(batch).detach(), sampled)
        with torch.no_grad():
            assert torch.equal(policy.score(batch), sampled)
    ordinary = Policy(coin(parameters), TOKENIZER.vocab_size, CONFIG).score(batch).detach()
    assert 0.0 < float((ordinary - sampled).abs().max()) < 1e-5  # the same model, other roundings


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_ordinary_ones(parameters, recompute):
    found, config = [], replace(CONFIG, recompute=recompute)
    model, backend = invariant(parameters)
    batch, _ = packed(drawn(model, backend)[::3])
    slope = random(len(batch.targets))
    for each, scorer in ((model, logprobs), (coin(parameters), loss.logprobs)):
        policy = Policy(each, TOKENIZER.vocab_size, config, logprobs=scorer)
        (policy.score(batch) * slope).sum().backward()
        found.append({name: p.grad for name, p in each.named_parameters()})
    for name, gradient in found[1].items():
        most = float(gradient.abs().max())
        assert most > 0.0, name
        assert float((found[0][name] - gradient).abs().max()) < 1e-4 * most, name


@pytest.mark.parametrize("recipe", [GroupRelative(Grpo(kl=0.1), 8), Proximal(Ppo(kl=0.1))])
def test_no_gap_in_any_round_of_a_run(parameters, tmp_path, recipe):
    """Nor after updates, whichever way the run goes on."""
    rows, _ = play(parameters, tmp_path, recipe, rollouts=replace(EXACT, replay_routing=True))
    assert len(rows) == CONFIG.steps and any(row["norm"] > 0.0 for row in rows)
    for row in rows:
        assert row["gap_most"] == row["gap"] == row["ratio"] == row["rerouted"] == 0.0
    assert rows[0].get("kl", 0.0) == 0.0 < rows[-1].get("kl", 1.0)


def test_one_bit_of_a_difference_is_refused(parameters, tmp_path):
    model, backend = invariant(parameters)
    corpus = prompts_of([written(tmp_path / "prompts.jsonl")], TOKENIZER, 2048)
    sampler = Sampler(model, TOKENIZER, Rewards([yes]), EXACT, backend=backend)
    other, _ = invariant(parameters)
    policy = Policy(other, TOKENIZER.vocab_size, CONFIG, logprobs=logprobs)
    recipe = GroupRelative(Grpo(), EXACT.group)
    run = Rounds(recipe, policy, sampler, corpus, EXACT)
    _, at = run.draw(None)
    with torch.no_grad():
        other.norm.scale.copy_(other.norm.scale.nextafter(torch.tensor(9.0)))
    for position in (None, at):  # at the beginning and in a later round
        with pytest.raises(TrainingError, match="differ by .* more than 0: what is drawn"):
            run.draw(position)


@pytest.mark.parametrize(
    "change, config",
    [
        (lambda model: adapt(model, 2, 16.0), CONFIG),
        (lambda model: quantize(model, "ceil"), CONFIG),
        (lambda model: model.bfloat16(), CONFIG),
        (lambda model: None, replace(CONFIG, autocast=True)),
        (lambda model: setattr(model.block[1].attn, "attend", attend), CONFIG),
    ],
)
def test_what_cannot_be_computed_so_is_refused(change, config):
    model = Transformer(NUMBERS)
    change(model)
    with pytest.raises(ValueError, match="needs all parameters as published, in float32 on a cpu"):
        make_invariant(model, config)


def test_without_the_compiled_core_it_is_a_sentence(parameters, tmp_path, monkeypatch):
    monkeypatch.setattr(reinforce, "has_native", lambda: False)
    with pytest.raises(BackendUnavailable, match="needs the package's compiled core"):
        play(parameters, tmp_path, GroupRelative(Grpo(), EXACT.group), rollouts=EXACT)
    assert not (tmp_path / "run").exists()
