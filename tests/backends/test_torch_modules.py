"""The classes people know: one by one, together, trained, and with a part swapped."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402

from gptoss.backends import load_backend  # noqa: E402
from gptoss.backends.torch.backend import TorchBackend  # noqa: E402
from gptoss.backends.torch.modules import (  # noqa: E402
    AttentionBlock,
    Experts,
    MLPBlock,
    ModelConfig,
    RMSNorm,
    RotaryEmbedding,
    TopKRouter,
    Transformer,
    TransformerBlock,
    canonical_state_dict,
    reset_parameters,
)
from gptoss.backends.torch.ops import PackedTensor  # noqa: E402
from gptoss.checkpoint.huggingface import HUGGINGFACE, HUGGINGFACE_BF16  # noqa: E402
from gptoss.checkpoint.open import open_checkpoint  # noqa: E402
from gptoss.checkpoint.openai import ORIGINAL  # noqa: E402
from gptoss.checkpoint.synthesize import synthesize  # noqa: E402
from gptoss.model.mxfp4 import encode  # noqa: E402
from gptoss.model.weights import random_weights, specs  # noqa: E402
from tests.backends.test_conformance import logits_of, text  # noqa: E402
from tests.conftest import TINY  # noqa: E402


def tensors(weights):
    return {name: torch.from_numpy(x) for name, x in weights.items()}


@pytest.fixture
def model(weights):
    model = Transformer(TINY)
    model.load_state_dict(tensors(weights))
    return model


def test_norm_alone():
    x = torch.randn(2, 5, 32)
    norm = RMSNorm(32)(x)
    torch.testing.assert_close(norm.square().mean(-1), torch.ones(2, 5), atol=1e-4, rtol=0)


def test_rotary_embedding_alone():
    """Turning keeps lengths but for YaRN's concentration, and a score needs only the distance."""
    rope = RotaryEmbedding(TINY)
    q, k = torch.randn(4, 16).expand(20, 4, 16), torch.randn(2, 16).expand(20, 2, 16)
    turned_q, turned_k = rope(q, k)
    concentration = 0.1 * np.log(32) + 1
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1) * concentration)
    scores = turned_q[:, 0] @ turned_k[:, 0].T
    torch.testing.assert_close(scores.diagonal(-3), scores[3, 0].expand(17), atol=1e-4, rtol=1e-4)
    batched, _ = rope(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1))
    assert torch.equal(batched[2], turned_q)
    shifted, _ = rope(q[:5], k[:5], torch.arange(10, 15))
    assert torch.equal(shifted, turned_q[10:15])


def test_router_and_experts_alone():
    x = torch.randn(7, 32)
    chosen, share = TopKRouter(TINY)(x)
    assert chosen.shape == share.shape == (7, 2)
    torch.testing.assert_close(share.sum(-1), torch.ones(7))
    assert Experts(TINY)(x, chosen, share).shape == (7, 32)


@pytest.mark.parametrize("make", [AttentionBlock, TransformerBlock])
@pytest.mark.parametrize("layer", [0, 1])
def test_blocks_alone_are_causal_and_rows_are_strangers(make, layer):
    block = make(TINY, layer)
    reset_parameters(block, torch.Generator().manual_seed(0))
    x = torch.randn(3, 20, 32)
    together = block(x)
    assert together.shape == x.shape
    torch.testing.assert_close(together[1], block(x[1]))
    torch.testing.assert_close(together[:, :13], block(x[:, :13]))
    changed = x.clone()
    changed[:, 5] += 1
    moved = (block(changed) - together).abs().amax(dim=(0, 2)) > 1e-7
    first_unmoved = 5 + TINY.sliding_window if layer == 0 else 20
    assert moved.tolist() == [5 <= i < first_unmoved for i in range(20)]


def test_mlp_block_alone():
    block, x = MLPBlock(TINY), torch.randn(2, 6, 32)
    torch.testing.assert_close(block(x)[1], block(x[1]))


def test_the_whole_is_its_parts(model):
    tokens = torch.tensor([text(20), text(20, seed=1)])
    x = model.embedding(tokens)
    for block in model.block:
        x = block(x)
    torch.testing.assert_close(model.unembedding(model.norm(x)), model(tokens))


def test_the_module_is_the_backend(model, weights64):
    reference = load_backend("reference", TINY, weights64.get, dtype="float64")
    rows = [text(50), text(50, seed=1)]
    truth = np.stack([logits_of(reference, row, [50]) for row in rows])
    logits = model.double()(torch.tensor(rows)).detach()
    np.testing.assert_allclose(logits, truth, atol=1e-5)
    torch.testing.assert_close(model(torch.tensor(rows[0])).detach(), logits[0])
    wanted = model(torch.tensor(rows), wanted=torch.tensor([99, 3])).detach()
    torch.testing.assert_close(wanted, logits.view(100, -1)[[99, 3]])
    shifted = model(torch.tensor(rows), torch.arange(1000, 1050)).detach()
    torch.testing.assert_close(shifted, logits)  # only distances matter


def test_parameters_have_canonical_names(model, weights):
    state = model.state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        spec.name: spec.shape for spec in specs(TINY)
    }
    for name, x in weights.items():
        np.testing.assert_array_equal(state[name], x)


def test_a_fresh_model_is_ready_to_be_trained():
    one, two = (Transformer(TINY) for _ in range(2))
    for model in (one, two):
        model.reset_parameters(torch.Generator().manual_seed(7))
    state = one.state_dict()
    assert all(torch.equal(x, two.state_dict()[name]) for name, x in state.items())
    for name, x in state.items():
        if name.endswith("norm.scale"):
            assert (x == 1).all()
        elif name.endswith(("bias", "sinks")):
            assert (x == 0).all()
        else:
            assert 0.01 < x.std() < 0.03


def test_loss_falls_in_ten_lines():
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens = torch.tensor([text(40), text(40, seed=1)])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        logits = model(tokens)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_training_works_after_inference_has_filled_the_tables(weights):
    """Tables made under inference mode could not be saved for a backward pass."""
    config = replace(TINY, rope_theta=140_000.0)
    load = load_backend("torch", config, weights.get, dtype="float32")
    logits_of(load, text(5), [5])
    Transformer(config)(torch.tensor(text(5))).sum().backward()


def test_a_padded_batch_has_no_nan():
    model = Transformer(TINY)
    logits = model(torch.zeros(3, 30, dtype=torch.int64))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class FirstExperts(torch.nn.Module):
    """Sends every token to experts 0 and 1, and counts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tensor([[0, 1]]).expand(len(x), 2), torch.full((len(x), 2), 0.5)


def test_a_swapped_router_is_really_used(model, weights):
    swapped = Transformer(TINY, router=FirstExperts)
    swapped.load_state_dict(tensors(weights), strict=False)
    tied = Transformer(TINY)
    tied.load_state_dict(
        tensors({n: 0 * w if ".gate." in n else w for n, w in weights.items()})
    )  # equal scores: experts 0 and 1, half each
    tokens = torch.tensor([text(20)])
    assert torch.equal(swapped(tokens), tied(tokens))
    assert not torch.allclose(swapped(tokens), model(tokens))
    assert all(block.mlp.gate.calls == 2 for block in swapped.block)
    block = MLPBlock(TINY, experts=lambda x, chosen, share: 10 * x)
    block_in = torch.randn(4, 32)
    torch.testing.assert_close(block(block_in), block_in + 10 * block.norm(block_in))


class LastExperts(TopKRouter):
    """Ours, but for which experts win."""

    def forward(self, x):
        chosen, share = super().forward(x)
        return 3 - chosen, share


class Doubled(Experts):
    """Ours, twice."""

    def forward(self, x, chosen, share):
        return 2 * super().forward(x, chosen, share)


def test_a_subclass_of_our_parts_is_really_used():
    block, x = MLPBlock(TINY, LastExperts(TINY), Doubled(TINY)), torch.randn(4, 32)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    ours = block.norm(x)
    chosen, share = TopKRouter.forward(block.gate, ours)
    mixed = 2 * Experts.forward(block.experts, ours, 3 - chosen, share)
    torch.testing.assert_close(block(x), x + mixed)


class Sevens(torch.nn.Module):
    """A part with a start of its own; as a router, as experts or as an attention."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.own = torch.nn.Parameter(torch.full((3, 3), 7.0))


def test_a_swapped_part_starts_as_it_wants_to():
    model = Transformer(TINY, router=Sevens, attend=Sevens())
    for swapped in (*model.block, MLPBlock(TINY, experts=Sevens())):
        sevens = [x for name, x in swapped.named_parameters() if name.endswith(".own")]
        assert sevens
        assert all((x == 7).all() for x in sevens)
    matrices = [x for n, x in model.named_parameters() if x.dim() > 1 and "bias" not in n]
    deviations = [x.std().item() for x in matrices if x.shape != (3, 3)]
    assert len(deviations) == 2 + 4 * 4
    assert all(0.015 < x < 0.025 for x in deviations)


class NormedExperts(torch.nn.Module):
    """Experts whose names are not ours, one of them that of the block's own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(32)
        self.up = torch.nn.Linear(32, 32)
        self.mlp1_gain = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, chosen, share):
        return self.up(self.norm(x))


def test_swapped_experts_keep_their_names():
    one, two = (MLPBlock(TINY, experts=NormedExperts()) for _ in range(2))
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    state = one.state_dict()
    assert sorted(state) == sorted(
        "norm.scale gate.weight gate.bias mlp1_gain "
        "experts.norm.scale experts.up.weight experts.up.bias".split()
    )
    two.load_state_dict(state)
    theirs = dict(two.named_parameters())
    assert all(torch.equal(x, theirs[name]) for name, x in one.named_parameters())
    assert not torch.equal(two.norm.scale, two.experts.norm.scale)


def test_a_routers_shares_may_be_wider_than_the_model():
    swapped = Transformer(TINY, router=FirstExperts).bfloat16()
    logits = swapped(torch.tensor(text(5)))
    assert logits.dtype is torch.bfloat16
    assert logits.isfinite().all()


def test_a_swapped_attention_is_really_used(model, weights):
    seen = []

    def forgetful(q, k, v, sinks, window):
        seen.append((tuple(q.shape), tuple(k.shape), sinks.shape[0], window))
        return torch.zeros_like(q)

    swapped = Transformer(TINY, attend=forgetful)
    swapped.load_state_dict(tensors(weights))
    tokens = torch.tensor([[3, 9, 9], [4, 4, 9]])
    logits = swapped(tokens)
    torch.testing.assert_close(logits[0, 1], logits[1, 2])  # the past is not seen
    assert seen == [((2, 4, 3, 16), (2, 2, 3, 16), 4, w) for w in (8, None, 8, None)]


@pytest.mark.parametrize(
    ("layout", "packed"),
    [
        (ORIGINAL, False),
        (ORIGINAL, True),
        (HUGGINGFACE, False),
        (HUGGINGFACE, True),
        (HUGGINGFACE_BF16, False),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_every_layouts_state_dict_loads(layout, packed):
    weights = random_weights(TINY)
    quantised = {n: encode(w) for n, w in weights.items() if n.endswith("_weight")}
    if layout.packed:
        weights |= {n: w.decode() for n, w in quantised.items()}
    theirs = {}
    for entry in layout.entries(TINY):
        whole = weights[entry.canonical]
        theirs[entry.name] = torch.from_numpy(
            {
                "whole": lambda whole=whole: whole,
                "rows": lambda whole=whole, entry=entry: whole[slice(*entry.rows)],
                "transposed": lambda whole=whole: whole.swapaxes(1, 2),
                "blocks": lambda entry=entry: quantised[entry.canonical].blocks,
                "scales": lambda entry=entry: quantised[entry.canonical].scales,
            }[entry.part]()
        )
    model = Transformer(TINY, packed=packed)
    model.load_state_dict(theirs)
    truth = logits_of(load_backend("reference", TINY, weights.get), text(20), [20])
    np.testing.assert_allclose(model(torch.tensor(text(20))).detach(), truth, atol=1e-3)
    if packed:
        again = canonical_state_dict(model.state_dict(), TINY)
        assert "block.0.mlp.mlp1_weight.blocks" in again
        assert not any("mlp1_weight" in name for name, _ in model.named_parameters())


def test_unknown_names_are_still_refused(weights):
    with pytest.raises(RuntimeError, match="block.0.attn.sink_logits"):
        Transformer(TINY).load_state_dict(
            {**tensors(weights), "block.0.attn.sink_logits": torch.zeros(4)}
        )


@pytest.mark.parametrize("packed", [False, True])
def test_from_checkpoint(tmp_path, packed):
    synthesize(TINY, tmp_path / "model")
    model = Transformer.from_checkpoint(tmp_path / "model", dtype="float32", packed=packed)
    truth = load_backend("reference", TINY, open_checkpoint(tmp_path / "model").read)
    tokens = text(20)
    logits = model(torch.tensor(tokens))
    np.testing.assert_allclose(logits.detach(), logits_of(truth, tokens, [20]), atol=1e-4)
    logits.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0  # memory of its own, not the mapped file


def test_from_checkpoint_gives_contiguous_parameters(tmp_path):
    """Even where the file holds the transpose."""
    synthesize(TINY, tmp_path / "model", layout="huggingface-bf16")
    model = Transformer.from_checkpoint(tmp_path / "model")
    assert all(x.is_contiguous() for x in model.state_dict().values())


@pytest.mark.parametrize("dtype", ["float16", "bf16", torch.float16, torch.int8], ids=str)
def test_from_checkpoint_refuses_an_unknown_dtype(tmp_path, dtype):
    with pytest.raises(ValueError, match="float32, bfloat16, float64, not"):
        Transformer.from_checkpoint(tmp_path, dtype=dtype)


def test_packed_rows_are_the_rows_alone(tiny, weights):
    """Of lengths that are attended together, padded, and of one that stands alone."""
    model = Transformer(tiny)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    lengths = [3, 90, 1, 17, 65, 70]
    tokens = torch.randint(tiny.vocab_size, (sum(lengths),))
    together = model(tokens, lengths=lengths)
    alone = torch.cat([model(row) for row in tokens.split(lengths)])
    assert (together - alone).abs().max() < 1e-5 * alone.abs().max()


def test_a_head_stands_in_for_the_unembedding(tiny):
    model = Transformer(tiny)
    tokens = torch.arange(7)
    hidden = model(tokens, head=lambda x: x)
    assert torch.equal(hidden @ model.unembedding.weight.T, model(tokens))


def test_experts_stay_packed_on_the_way_back(tiny, weights):
    """The gradient of what goes in is that of the decoded matrices, which autograd never keeps."""
    stack = PackedTensor.of(encode(weights["block.0.mlp.mlp1_weight"]))
    x = torch.randn(5, tiny.hidden_size, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        stack(x, 2).square().sum().backward()
    assert stack.shape[1:] not in kept
    [gradient], x.grad = [x.grad], None
    (x @ stack.decode(torch.float32, 2).T).square().sum().backward()
    assert torch.allclose(gradient, x.grad, rtol=1e-5, atol=1e-6)


def test_a_backend_runs_the_module_that_is_being_trained(tiny):
    model = Transformer(tiny)
    backend, tokens = TorchBackend.of(model), text(12, tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    seen = logits_of(backend, tokens, [5, 7])
    assert np.abs(seen - model(torch.tensor(tokens)).detach().numpy()).max() < 1e-4
