"""Gradients of every parameter, in float64, against differences of the reference itself."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402

from gptoss.backends import load_backend  # noqa: E402
from gptoss.backends.torch.cache import attend_whole  # noqa: E402
from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.model.weights import random_weights, specs  # noqa: E402
from tests.backends.test_conformance import logits_of, text  # noqa: E402
from tests.conftest import TINY  # noqa: E402

SMALL = replace(TINY, num_hidden_layers=2, hidden_size=16, intermediate_size=16, vocab_size=32)
TOKENS = text(21, SMALL)  # past the window of 8 twice, and no whole number of windows
STEP = 1e-6


@pytest.fixture(scope="module")
def numbers():
    return random_weights(SMALL, dtype=np.float64, scale=0.3)


def reference_loss(numbers):
    """Mean surprise of each next token, by the NumPy reference."""
    backend = load_backend("reference", SMALL, numbers.get, dtype="float64")
    backend.to_numpy = lambda logits: logits  # not rounded to float32
    logits = logits_of(backend, TOKENS, [len(TOKENS)])[:-1]
    surprise = np.log(np.exp(logits).sum(axis=1)) - logits[range(len(logits)), TOKENS[1:]]
    return surprise.mean()


@pytest.fixture(scope="module")
def trained(numbers):
    """The torch model after one backward pass of the same loss."""
    model = Transformer(SMALL).double()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in numbers.items()})
    tokens = torch.tensor([TOKENS])
    logits = model(tokens)[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    assert abs(loss.item() - reference_loss(numbers)) < 1e-12
    loss.backward()
    return model


@pytest.mark.parametrize("name", [spec.name for spec in specs(SMALL)])
def test_gradient_is_the_slope_of_the_reference(trained, numbers, name):
    """Along three random directions, a sink's and a bias's included."""
    parameters = dict(trained.named_parameters())
    experts = name.replace(".mlp1_", ".experts.mlp1_").replace(".mlp2_", ".experts.mlp2_")
    gradient = parameters[experts].grad.numpy()
    assert np.abs(gradient).max() > 0
    rng = np.random.default_rng(len(name))
    for _ in range(3):
        direction = rng.standard_normal(gradient.shape)
        up, down = (
            reference_loss({**numbers, name: numbers[name] + sign * STEP * direction})
            for sign in (1, -1)
        )
        slope = (up - down) / (2 * STEP)
        assert abs(slope - (gradient * direction).sum()) <= 1e-6 * max(1.0, abs(slope)), name


@pytest.mark.parametrize("window", [None, 3, 8, 64])
@pytest.mark.parametrize("length", [1, 9, 16])
def test_attention_passes_gradcheck(length, window):
    generator = torch.Generator().manual_seed(0)
    q, k, v, sinks = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((1, 4, length, 4), (1, 2, length, 4), (1, 2, length, 4), (4,))
    )
    assert torch.autograd.gradcheck(lambda *x: attend_whole(*x, window), (q, k, v, sinks))


@pytest.mark.parametrize("window", [None, 8])
def test_training_never_keeps_a_square_of_the_length(window):
    """Twice the text, twice what autograd saves for attention."""

    def saved(length):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            q, k = (torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(2))
            attend_whole(q, k, k, torch.zeros(2, requires_grad=True), window)
        return sum(sizes)

    assert saved(640) <= 2.1 * saved(320)
