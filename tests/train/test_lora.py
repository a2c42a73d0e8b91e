"""Adapters over packed experts: nothing changes at first, everything later, and merged alike."""

import pytest

torch = pytest.importorskip("torch")

from gptoss.backends.torch.backend import TorchBackend  # noqa: E402
from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.backends.torch.ops import PackedTensor  # noqa: E402
from gptoss.checkpoint.synthesize import reader as synthetic  # noqa: E402
from gptoss.model.mxfp4 import Packed  # noqa: E402
from gptoss.model.weights import specs  # noqa: E402
from gptoss.train.config import TrainConfig  # noqa: E402
from gptoss.train.export import reader  # noqa: E402
from gptoss.train.learner import trained  # noqa: E402
from gptoss.train.lora import LowRank, LowRankStack, adapt  # noqa: E402
from gptoss.train.loss import cross_entropy  # noqa: E402
from tests.backends.test_conformance import logits_of, text  # noqa: E402
from tests.train.runs import TINY, draw, train  # noqa: E402

CONFIG = TrainConfig(steps=8, lr=3e-2, warmup=0, threads=1, save_every=100)
TOKENS = torch.arange(20)


def packed(dtype=torch.float32):
    """A random model whose experts are packed."""
    model, read = Transformer(TINY, packed=True), synthetic(TINY, 0)
    state = {}
    for spec in specs(TINY):
        stored = read(spec.name)
        if isinstance(stored, Packed):
            state[f"{spec.name}.blocks"] = torch.from_numpy(stored.blocks.copy())
            state[f"{spec.name}.scales"] = torch.from_numpy(stored.scales.copy())
        else:
            state[spec.name] = torch.from_numpy(stored.astype("float32"))
    model.load_state_dict(state)
    return model.to(dtype)


def adapted(dtype=torch.float32):
    torch.manual_seed(0)
    model = packed(dtype)
    adapt(model, rank=2, alpha=4.0)
    return model


def test_a_new_adapter_changes_nothing():
    assert torch.equal(adapted()(TOKENS), packed()(TOKENS))


def test_only_adapters_are_trained_and_all_of_them():
    model = adapted()
    per_layer = {f"attn.{n}.{x}" for n in ("qkv", "out") for x in "ab"} | {
        f"mlp.experts.mlp{n}_weight.{x}" for n in (1, 2) for x in "ab"
    }
    names = {f"block.{i}.{n}" for i in range(TINY.num_hidden_layers) for n in per_layer}
    assert set(trained(model)) == names
    with torch.no_grad():
        for p in trained(model).values():
            p.normal_(0.0, 0.1)
    batches, _ = draw(0)
    cross_entropy(model, batches[0], CONFIG)[0].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == (name in names), name


@pytest.mark.parametrize("name", ["block.1.mlp.experts.mlp1_weight.a", "block.0.attn.out.b"])
def test_gradients_are_the_slope(name):
    model = adapted(torch.float64).double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for p in trained(model).values():
            p.normal_(0.0, 0.1)

    def loss():
        return model(TOKENS).square().mean()

    loss().backward()
    p, step = parameters[name], 1e-5
    direction = torch.randn(p.shape, dtype=p.dtype)
    with torch.no_grad():
        p += step * direction
        up = loss()
        p -= 2 * step * direction
        slope = (up - loss()) / (2 * step)
    assert abs(slope - (p.grad * direction).sum()) < 1e-6 * max(1.0, abs(slope))


def test_training_learns_with_packed_experts_untouched(tmp_path):
    model = adapted()
    before = {n: b.clone() for n, b in model.named_buffers()}
    rows, _ = train(tmp_path, CONFIG, model=model)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert any(n.endswith(".blocks") for n in before)
    size = (tmp_path / "states" / "00000008" / "state.pt").stat().st_size
    assert size < 3 * sum(4 * p.numel() for p in trained(model).values()) + 200_000


def test_merged_it_computes_the_same(tmp_path):
    model = adapted()
    train(tmp_path, CONFIG, model=model)
    read, merged = reader(model), Transformer(TINY)
    merged.load_state_dict({s.name: torch.from_numpy(read(s.name)) for s in specs(TINY)})
    assert (merged(TOKENS) - model(TOKENS)).abs().max() < 1e-4 * model(TOKENS).abs().max()
    assert (packed()(TOKENS) - model(TOKENS)).abs().max() > 1e-2


def test_experts_without_a_change_keep_their_bytes():
    model, fresh = adapted(), packed()
    stored = reader(model)("block.2.mlp.mlp2_weight")
    assert isinstance(stored, Packed)
    whole = fresh.block[2].mlp.experts.mlp2_weight
    assert (stored.blocks == whole.blocks.numpy()).all()


def test_sampling_sees_the_adapters(tmp_path):
    model = adapted()
    backend, tokens = TorchBackend.of(model), text(12, TINY)
    before = logits_of(backend, tokens, [12])
    train(tmp_path, CONFIG, model=model)
    after = logits_of(backend, tokens, [5, 7])
    assert abs(after - before).max() > 1e-2
    assert abs(after - model(torch.tensor(tokens)).detach().numpy()).max() < 1e-4


def test_parts_alone_in_bfloat16():
    linear, stack = torch.nn.Linear(6, 4), PackedTensor.zeros(3, 4, 32)
    one, many = LowRank(linear, 2, 1.0), LowRankStack(stack, 2, 1.0)
    assert one.bfloat16()(torch.ones(5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert many.unbind()(torch.ones(5, 32, dtype=torch.bfloat16), 1).shape == (5, 4)
    assert torch.equal(many.merged(2), torch.zeros(4, 32))
