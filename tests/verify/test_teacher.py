"""What is stored of a reference's answers is enough to compare with elsewhere."""

import numpy as np
import pytest

from gptoss.backends import load_backend
from gptoss.errors import GptOssError
from gptoss.model.weights import random_weights
from gptoss.verify.teacher import Answers, agreement, ask, reference, run, table
from tests.conftest import TINY

TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, 300).tolist()


@pytest.fixture(scope="module")
def theirs(weights):
    return ask(reference(TINY, weights.__getitem__, TOKENS), TOKENS, {"by": "reference"})


def test_a_model_agrees_with_itself(theirs, weights):
    found = agreement(run(load_backend("reference", TINY, weights.__getitem__), TOKENS), theirs)
    assert (found.tokens, found.top1, found.top5) == (300, 1.0, 1.0)
    assert abs(found.kl) < 1e-9 and found.perplexity == pytest.approx(found.reference, rel=1e-5)
    assert "300 tokens" in table(found)


def test_the_figures_are_what_their_names_say(theirs, weights):
    """Against all logits, in the plain way."""
    others = random_weights(TINY, seed=1)
    mixed = {name: x + 0.02 * others[name] for name, x in weights.items()}
    ours = load_backend("reference", TINY, mixed.__getitem__)
    found = agreement(run(ours, TOKENS), theirs)
    p, q = (
        np.concatenate(list(rows)).astype(np.float64)
        for rows in (reference(TINY, weights.__getitem__, TOKENS), run(ours, TOKENS))
    )
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (p, q))
    best = np.argsort(-q, axis=-1)
    assert found.top1 == (best[:, 0] == p.argmax(-1)).mean() < 1.0
    assert found.top5 == (best[:, :5] == p.argmax(-1)[:, None]).any(-1).mean() < 1.0
    came = q[np.arange(len(TOKENS) - 1), TOKENS[1:]]
    assert found.perplexity == pytest.approx(np.exp(-came.mean()))
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert 0.9 * kl.mean() < found.kl <= kl.mean()  # the tail counts as one
    assert found.kl_max > found.kl


def test_answers_are_small_and_come_back(tmp_path, theirs, weights):
    path = tmp_path / "answers.npz"
    theirs.save(path)
    assert path.stat().st_size < 300 * len(TOKENS)
    again = Answers.load(path)
    assert again.about["by"] == "reference"
    ours = load_backend("reference", TINY, weights.__getitem__)
    assert agreement(run(ours, TOKENS), again).kl == pytest.approx(0.0, abs=1e-6)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").write_text("nothing")
    np.savez(tmp_path / "b.npz", tokens=[1])
    for name in ("a", "b.npz"):
        with pytest.raises(GptOssError, match="holds no answers"):
            Answers.load(tmp_path / name)
