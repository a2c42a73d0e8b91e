"""What training rounds to is what export writes, and the gradient passes straight on."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402

from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.model.mxfp4 import RULES, encode  # noqa: E402
from gptoss.train.quantize import QuantizedStack, quantize, rounded, unchanging  # noqa: E402
from tests.train.runs import CONFIG, TINY, train  # noqa: E402


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1.0, 1e20])
def test_the_same_numbers_as_the_codec(rule, scale):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 40, 96)) * scale).astype(np.float32)
    x[0, 0] = 0.0
    x[0, 1] = np.tile([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], 12) * np.float32(scale)
    x[0, 2] = -x[0, 1]
    x[1, :, ::7] *= 100.0
    ours = rounded(torch.from_numpy(x), rule).numpy()
    assert np.array_equal(ours, encode(x, rule).decode())


def test_the_gradient_passes_straight_on():
    stack = QuantizedStack(torch.nn.Parameter(torch.randn(2, 4, 32)), "floor")
    x = torch.randn(5, 32)
    found = stack.unbind()(x, 1)
    assert torch.equal(found, x @ rounded(stack.weight[1], "floor").T)
    found.sum().backward()
    assert torch.allclose(stack.weight.grad[1], x.sum(0).expand(4, 32), atol=1e-6)
    assert not stack.weight.grad[0].any()


@pytest.mark.parametrize("rule", RULES)
def test_a_trained_model_is_as_good_after_packing(tmp_path, rule):
    torch.manual_seed(0)
    model = Transformer(TINY)
    quantize(model, rule)
    rows, _ = train(tmp_path, replace(CONFIG, steps=5), model=model)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    seen = model(torch.arange(12))
    for block in model.block:
        for name in ("mlp1_weight", "mlp2_weight"):
            weight = getattr(block.mlp.experts, name).weight
            with torch.no_grad():
                weight.copy_(torch.from_numpy(encode(weight.numpy(), rule).decode()))
    assert torch.equal(model(torch.arange(12)), seen)


@torch.no_grad()
def test_what_is_kept_while_drawing_is_the_same_and_goes():
    torch.manual_seed(0)
    model, tokens = Transformer(TINY), torch.arange(12)
    quantize(model, "ceil")
    for _ in range(2):
        seen = model(tokens)
        with unchanging(model):
            assert torch.equal(model(tokens), seen)
            assert torch.equal(model(tokens), seen)
        for block in model.block:
            block.mlp.experts.mlp1_weight.weight.mul_(1.3)
        assert not torch.equal(model(tokens), seen)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule must be one of floor"):
        quantize(Transformer(TINY), "nearest")
