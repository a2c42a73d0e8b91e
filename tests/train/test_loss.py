"""Chunked log-probabilities, packing, and the whole loss beside transformers and float64."""

import pytest

torch = pytest.importorskip("torch")


from contextlib import contextmanager  # noqa: E402

from gptoss.backends.torch.modules import Transformer  # noqa: E402
from gptoss.model.weights import random_weights  # noqa: E402
from gptoss.train import loss as subject  # noqa: E402
from gptoss.train.batch import IGNORE, Document, collate  # noqa: E402
from gptoss.train.config import TrainConfig  # noqa: E402
from gptoss.train.loss import cross_entropy, logprobs, score  # noqa: E402
from gptoss.train.routing import Routing  # noqa: E402
from tests.conftest import TINY  # noqa: E402
from tests.model.oracle import stable_topk, transformers_model  # noqa: E402

PLAIN = TrainConfig()
WEIGHTS = random_weights(TINY, scale=0.2)  # more would amplify float32's rounding beyond 1e-4


@pytest.fixture
def weights():
    return WEIGHTS


def documents(config, *lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for n in lengths:
        row = torch.randint(config.vocab_size, (n + 1,), generator=generator).tolist()
        targets = [t if i % 3 else IGNORE for i, t in enumerate(row[1:])]
        yield Document(row[:-1], targets, f"of {n}")


def model_of(config, numbers, dtype=torch.float32):
    model = Transformer(config).to(dtype)
    model.load_state_dict({name: torch.from_numpy(x).to(dtype) for name, x in numbers.items()})
    return model


def gradients(model, batches, config):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        value = cross_entropy(model, batch, config)[0]
        value.backward()
        total += value.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@contextmanager
def counting():
    """The sizes of what autograd keeps."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        yield sizes


def test_chunks_are_the_softmax(monkeypatch):
    monkeypatch.setattr(subject, "CHUNK", 7 * 3)  # three rows at a time, the last chunk shorter
    x, table = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (8, 7))
    targets = torch.randint(7, (8,))
    whole = (x @ table.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(logprobs(x, table, targets), whole)
    assert torch.autograd.gradcheck(lambda x, table: logprobs(x, table, targets), (x, table))


def test_all_logits_are_never_there(monkeypatch):
    """Nothing that autograd keeps, and nothing it is given, has a number for each word."""
    monkeypatch.setattr(subject, "CHUNK", 4000)
    x, table = torch.randn(64, 4), torch.randn(1000, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        logprobs(x.requires_grad_(), table, torch.zeros(64, dtype=torch.long)).sum().backward()
    assert kept and max(kept) == table.numel()


@pytest.mark.parametrize("balance", [0.0, 0.1])
def test_gradients_are_those_of_float64(tiny, weights, balance):
    batches = collate([list(documents(tiny, 30, 7)), list(documents(tiny, 12, seed=1))])
    config = TrainConfig(balance=balance)
    loss, found = gradients(model_of(tiny, weights), batches, config)
    exact, wanted = gradients(model_of(tiny, weights, torch.float64), batches, config)
    assert abs(loss - exact) < 1e-5
    for name, gradient in wanted.items():
        error = (found[name].double() - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_loss_and_gradients_are_those_of_transformers(tiny, weights):
    """Every parameter, in float32, on the same batch."""
    rows = list(documents(tiny, 40, 40))
    loss, found = gradients(model_of(tiny, weights), collate([rows]), PLAIN)
    theirs = transformers_model(tiny, {n: x.copy() for n, x in weights.items()}).train()
    theirs.requires_grad_(True)
    tokens = torch.tensor([row.tokens for row in rows])
    labels = torch.tensor([row.targets for row in rows])
    with stable_topk():
        logits = theirs(tokens, use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE
    )
    wanted.backward()
    assert abs(loss - wanted.item()) < 1e-4 * wanted.item()
    ours = Transformer(tiny)
    ours.load_state_dict({name: p.grad for name, p in theirs.named_parameters()})
    for name, gradient in ours.named_parameters():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_packed_documents_do_not_see_each_other(tiny, weights):
    model = model_of(tiny, weights)
    rows = list(documents(tiny, 5, 70, 21))
    together = score(model, collate([rows])[0], PLAIN)
    alone = torch.cat([score(model, collate([[row]])[0], PLAIN) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


def test_recomputation_changes_nothing_but_what_is_kept(tiny, weights):
    model, batches = model_of(tiny, weights), collate([list(documents(tiny, 50, 9))])
    kept = []
    for config in (TrainConfig(balance=0.1), TrainConfig(balance=0.1, recompute=True)):
        with counting() as sizes:
            kept.append((gradients(model, batches, config), sum(sizes)))
    (one, large), (other, small) = kept
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert small < 0.5 * large


def test_autocast_computes_in_bfloat16_and_trains_float32(tiny, weights):
    model, batches = model_of(tiny, weights), collate([list(documents(tiny, 50, 9))])
    exact, wanted = gradients(model, batches, PLAIN)
    loss, found = gradients(model, batches, TrainConfig(autocast=True))
    assert 0 < abs(loss - exact) < 0.05 * exact
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    likeness = torch.nn.functional.cosine_similarity(
        *(torch.cat([g[name].flatten() for name in wanted]) for g in (wanted, found)), dim=0
    )
    assert likeness > 0.9


def test_an_even_router_has_the_least_load_balancing_loss(tiny, weights):
    even, uneven = Routing(), Routing()
    scores = torch.zeros(8, 4)
    even("block.0.mlp.gate", scores)
    even("block.0.mlp.chosen", torch.tensor([[0, 1], [2, 3]] * 4))
    uneven("block.0.mlp.gate", scores + torch.tensor([5.0, 0, 0, 0]))
    uneven("block.0.mlp.chosen", torch.tensor([[0, 1]] * 8))
    assert even.uneven().item() == pytest.approx(1.0)
    assert uneven.uneven().item() > 1.5
    assert even.statistics() == {"busiest": 1.0, "idle": 0.0, "uneven": pytest.approx(1.0)}
    assert uneven.statistics()["idle"] == 0.5


def test_a_batch_in_which_nothing_is_learned_is_no_error(tiny, weights):
    silent = Document([1, 2, 3], [IGNORE] * 3, "silent")
    batches = collate([[silent], list(documents(tiny, 9))])
    loss, _ = gradients(model_of(tiny, weights), batches, PLAIN)
    assert loss > 0
