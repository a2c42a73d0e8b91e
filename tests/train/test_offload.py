"""With less memory the same numbers."""

import pytest

torch = pytest.importorskip("torch")

import json  # noqa: E402
import resource  # noqa: E402
from dataclasses import replace  # noqa: E402

from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.errors import TrainingError  # noqa: E402
from gptoss.train import shelf as shelves  # noqa: E402
from gptoss.train.config import Reading, TrainConfig  # noqa: E402
from gptoss.train.grpo import grpo  # noqa: E402
from gptoss.train.loss import cross_entropy  # noqa: E402
from gptoss.train.offload import Offloaded  # noqa: E402
from gptoss.train.quantize import quantize  # noqa: E402
from gptoss.train.recipes import sft  # noqa: E402
from gptoss.train.shelf import Disk, Host  # noqa: E402
from gptoss.train.trainer import Trainer  # noqa: E402
from tests.conftest import TINY  # noqa: E402
from tests.llm.toy import write_toy  # noqa: E402
from tests.train.runs import CONFIG, draw, losses, train  # noqa: E402
from tests.train.test_lora import adapted  # noqa: E402

CONFIG = replace(CONFIG, steps=4)


@pytest.fixture(autouse=True)
def no_tensor_is_small(monkeypatch):
    monkeypatch.setattr(shelves, "SMALL", 1000)


def whole():
    torch.manual_seed(CONFIG.seed)
    return Transformer(TINY)


def offloaded(path, shelf, make=whole, config=CONFIG, draw=draw):
    """A run of which everything that can be is put away."""
    learner = Offloaded(make(), config, shelf)
    run = Trainer(learner, config, path)
    run.run(draw, lambda batch: cross_entropy(learner.model, batch, config, learner.layer))
    return run.folder.rows(), learner


def rounded():
    model = whole()
    quantize(model, "ceil")
    return model


MADE = {
    "whole": (whole, replace(CONFIG, clip=0.05)),
    "adapted": (adapted, replace(CONFIG, muon=None)),
    "rounded": (rounded, replace(CONFIG, steps=2, clip=0.05)),
}


@pytest.fixture(scope="module", params=MADE)
def plain(request, tmp_path_factory):
    """A model, how it is trained, and what comes of it in memory."""
    make, config = MADE[request.param]
    rows, model = train(tmp_path_factory.mktemp("plain"), config, model=make())
    assert make is adapted or rows[0]["norm"] > config.clip  # gradients are shortened
    return make, config, losses(rows), model.state_dict()


@pytest.mark.parametrize("what", ["optimizer", "parameters"])
@pytest.mark.parametrize("where", ["disk", "host"])
def test_nothing_is_computed_differently(plain, tmp_path, what, where):
    make, config, found, state = plain
    shelf = Disk(tmp_path / "shelf") if where == "disk" else Host()
    rows, learner = offloaded(tmp_path / "run", shelf, make, replace(config, offload=what))
    assert losses(rows) == found
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_run_goes_on_with_or_without(tmp_path):
    """Stopped twice, and every time it goes on another way."""

    def until(last):
        def interrupted(position):
            if position == 2 * last:
                raise KeyboardInterrupt
            return draw(position)

        return interrupted

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", CONFIG, draw=until(1))
    config = replace(CONFIG, offload="parameters")
    with pytest.raises(KeyboardInterrupt):
        offloaded(tmp_path / "run", Disk(tmp_path), config=config, draw=until(3))
    rows, _ = train(tmp_path / "run", CONFIG)
    assert losses(rows) == losses(train(tmp_path / "plain", CONFIG)[0])


def test_accumulated_gradients_are_those_of_memory(tmp_path):
    config = replace(CONFIG, offload="parameters")
    learner, model = Offloaded(whole(), config, Disk(tmp_path)), whole()
    batches, _ = draw(0)
    learner.begin()
    for batch in batches:
        learner.learn(batch, lambda b: cross_entropy(learner.model, b, config, learner.layer))
        cross_entropy(model, batch, config)[0].backward()
    for (name, p), q in zip(learner.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(learner.gradient(p), q.grad), name


def test_files_have_no_names_and_hold_what_is_put_there(tmp_path):
    disk, told = Disk(tmp_path / "shelf"), []
    for seed, dtype in enumerate([torch.float32, torch.bfloat16, torch.uint8] * 3):
        x = (torch.rand(700, 901, generator=torch.Generator().manual_seed(seed)) * 99).to(dtype)
        told.append((x, disk.put(x)))
    assert list((tmp_path / "shelf").iterdir()) == []
    told[0][1].add_(1.0)
    disk.forget()
    assert torch.equal(told[0][1], told[0][0] + 1.0)
    assert all(torch.equal(x, kept) for x, kept in told[1:])
    assert disk.put(told[0][1]) is told[0][1]


def test_a_full_disk_is_one_sentence(tmp_path):
    """Said before anything is written into it: here by a limit to the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(TrainingError, match="4.2 MB more cannot be put away here: File too la"):
            Disk(tmp_path).put(torch.zeros(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_who_draws_answers_needs_all_parameters(tmp_path):
    config = TrainConfig(offload="parameters")
    with pytest.raises(ValueError, match="so these cannot be put away; the optimiser's state can"):
        grpo("nano", ["none.jsonl"], tmp_path, ["exact"], config=config)


def test_a_recipe_reads_layers_to_where_they_lie(tmp_path):
    line = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
    data = tmp_path / "sums.jsonl"
    data.write_text(json.dumps({"messages": line}) + "\n")
    toy, reading = write_toy(tmp_path / "models"), Reading(tokens=300)
    found = []
    for what in (None, "parameters"):
        config = TrainConfig(steps=2, lr=1e-2, warmup=0, threads=1, offload=what)
        run = sft(toy, [data], tmp_path / str(what), config=config, reading=reading)
        found.append(losses(run.folder.rows()))
    assert found[0] == found[1]
    block = run.learner.model.block[0]
    for x in (block.attn.qkv.weight, block.mlp.experts.mlp1_weight):
        assert run.learner.shelf.put(x.data).data_ptr() == x.data_ptr()  # it lies there
