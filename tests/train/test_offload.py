"""With less memory the same numbers."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.errors import TrainingError  # noqa: E402
from gptoss.train import shelf as shelves  # noqa: E402
from gptoss.train.loss import cross_entropy  # noqa: E402
from gptoss.train.offload import Offloaded  # noqa: E402
from gptoss.train.shelf import Disk, Host  # noqa: E402
from gptoss.train.trainer import Trainer  # noqa: E402
from tests.conftest import TINY  # noqa: E402
from tests.train.runs import CONFIG, draw, losses, train  # noqa: E402
from tests.train.test_lora import adapted  # noqa: E402

CONFIG = replace(CONFIG, steps=6)


@pytest.fixture(autouse=True)
def no_tensor_is_small(monkeypatch):
    monkeypatch.setattr(shelves, "SMALL", 1000)


def whole():
    torch.manual_seed(CONFIG.seed)
    return Transformer(TINY)


def offloaded(path, shelf, make=whole, config=CONFIG):
    """A run of which everything that can be is put away."""
    learner = Offloaded(make(), config, shelf)
    run = Trainer(learner, config, path)
    run.run(draw, lambda batch: cross_entropy(learner.model, batch, config, learner.layer))
    return run.folder.rows(), learner


@pytest.mark.parametrize("what", ["optimizer", "parameters"])
@pytest.mark.parametrize("make", [whole, adapted])
@pytest.mark.parametrize("where", ["disk", "host"])
def test_nothing_is_computed_differently(tmp_path, what, make, where):
    config = replace(CONFIG, offload=what, muon=1e-2 if make is whole else None, clip=0.05)
    shelf = Disk(tmp_path / "shelf") if where == "disk" else Host()
    rows, learner = offloaded(tmp_path / "away", shelf, make, config)
    plain, model = train(tmp_path / "here", replace(config, offload=None), model=make())
    assert losses(rows) == losses(plain)
    assert len(rows) == 6 and rows[0]["norm"] > config.clip  # gradients were shortened
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
