"""What is said of memory before a run is what the run then takes."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.errors import TrainingError  # noqa: E402
from gptoss.model.config import gpt_oss_20b  # noqa: E402
from gptoss.train import plan as planning  # noqa: E402
from gptoss.train.batch import Document, collate  # noqa: E402
from gptoss.train.config import TrainConfig, Tuning  # noqa: E402
from gptoss.train.learner import Torch  # noqa: E402
from gptoss.train.lora import adapt  # noqa: E402
from gptoss.train.loss import cross_entropy  # noqa: E402
from gptoss.train.objective import Rollouts  # noqa: E402
from gptoss.train.plan import make_plan  # noqa: E402
from tests.conftest import TINY  # noqa: E402

NUMBERS = replace(
    TINY, num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_experts=8, vocab_size=512
)
TOKENS, WHOLE = 384, Tuning()


def nbytes(tensors):
    return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def counted(config, tuning):
    """Parameters, gradients, the optimiser's state, and what was kept for backward: bytes."""
    torch.manual_seed(0)
    model = Transformer(NUMBERS, packed=bool(tuning.lora))
    if tuning.lora:
        adapt(model, tuning.lora, tuning.alpha)
    learner, kept = Torch(model, config), []
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept.append(x)
        return x

    row = torch.randint(NUMBERS.vocab_size, (TOKENS + 1,)).tolist()
    [batch] = collate([[Document(row[:-1], row[1:], "random")]])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = cross_entropy(model, batch, config)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    loss.backward()
    learner.update(1.0)
    states = [x for o in learner.optimizers for state in o.state.values() for x in state.values()]
    return {
        "parameters": nbytes([*model.parameters(), *model.buffers()]),
        "gradients": nbytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": nbytes(states),
        "activations": sum(storages.values()),
    }


@pytest.mark.parametrize(
    "config, tuning",
    [
        (TrainConfig(), Tuning()),
        (TrainConfig(muon=1e-2), Tuning()),
        (TrainConfig(), Tuning(lora=4)),
        (TrainConfig(autocast=True), Tuning()),
    ],
)
def test_a_plan_is_what_is_counted(tmp_path, monkeypatch, config, tuning):
    monkeypatch.setattr(planning, "CHUNK", 0)  # logits come and go
    plan = make_plan("small", NUMBERS, tmp_path, config, tuning, TOKENS)
    for name, found in counted(config, tuning).items():
        said = getattr(plan.needs, name)
        assert 0.8 * found < said < 1.35 * found, f"{name}: {said / found:.2f} of what was counted"


def test_each_way_of_saving_takes_less():
    """Of 20b: adapters, layers that are computed again, and what is put away."""

    def total(tuning=WHOLE, **given):
        return make_plan("20b", gpt_oss_20b(), ".", TrainConfig(**given), tuning, 4096).needs.total

    whole, adapters = total(), Tuning(lora=8, dtype="bfloat16")
    assert total(recompute=True) < 0.9 * whole
    assert total(offload="optimizer") < 0.6 * whole
    assert total(offload="parameters") < 0.1 * whole
    assert total(adapters, recompute=True) < 0.06 * whole
    assert total(adapters, offload="parameters") < 0.02 * whole


def test_what_cannot_fit_is_one_sentence_that_says_what_would(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda: 20 * 10**9)
    plan = make_plan("20b", gpt_oss_20b(), tmp_path, TrainConfig(), Tuning(), 4096)
    said = "20b needs about .* GB of memory .* 20.0 GB are free. Try --lora 8, --offload optimizer"
    with pytest.raises(TrainingError, match=said):
        plan.check()
    assert "parameters 83.7 GB + gradients 83.7 GB + optimizer 167.3 GB" in str(plan)
    config = TrainConfig(offload="parameters")
    plan = replace(
        make_plan("20b", gpt_oss_20b(), tmp_path, config, Tuning(lora=8), 512), room=10**9
    )
    assert plan.needs.total < plan.available
    with pytest.raises(TrainingError, match=f"in {tmp_path} beside memory, but 1.0 GB are free"):
        plan.check()
    with pytest.raises(TrainingError, match="of disk for a checkpoint, but 1.0 kB are free"):
        replace(plan, room=10**12, disk=1000).check()


def test_rollouts_take_their_caches_and_the_model_they_are_held_to(tmp_path):
    how = (tmp_path, TrainConfig(), Tuning(), TOKENS)
    few, many = Rollouts(rows=2), Rollouts(rows=8)
    needs = [make_plan("small", NUMBERS, *how, rollouts=r).needs for r in (few, many)]
    assert needs[1].rollouts == 4 * needs[0].rollouts > 0
    held = make_plan("small", NUMBERS, *how, rollouts=few, reference=True).needs
    assert held.rollouts - needs[0].rollouts == held.parameters
