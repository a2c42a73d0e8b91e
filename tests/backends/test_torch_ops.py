"""The torch operations one by one, where the conformance suite cannot look."""

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from gptoss.backends import load_backend  # noqa: E402
from gptoss.backends.torch import ops as module  # noqa: E402
from gptoss.backends.torch.cache import FullSequences, attend_past, attend_whole  # noqa: E402
from gptoss.backends.torch.ops import PackedTensor, TorchOps, from_numpy, rotations  # noqa: E402
from gptoss.errors import BackendUnavailable  # noqa: E402
from gptoss.model.mxfp4 import Packed, encode  # noqa: E402
from gptoss.model.reference import NumpyOps, attend_row  # noqa: E402
from gptoss.model.weights import random_weights  # noqa: E402
from tests.backends.test_conformance import text, trace_of  # noqa: E402
from tests.conftest import TINY  # noqa: E402

OPS = TorchOps()
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scale_and_byte_decodes_as_in_numpy(dtype, device):
    scale, byte = np.divmod(np.arange(65_536), 256)
    blocks = np.repeat(byte.astype(np.uint8)[:, None, None], 16, axis=2)  # [65536, 1, 16]
    packed = Packed(blocks, scale.astype(np.uint8)[:, None])
    numpy_dtype = {torch.bfloat16: ml_dtypes.bfloat16, torch.float64: np.float64}.get(dtype)
    truth = packed.decode(numpy_dtype or np.float32).astype(np.float64)
    ours = PackedTensor.of(packed, device).decode(dtype)
    assert ours.dtype is dtype
    numbers = ours.double().cpu().numpy()
    np.testing.assert_array_equal(numbers, truth)
    zero = truth == 0
    np.testing.assert_array_equal(np.signbit(numbers[zero]), np.signbit(truth[zero]))


def test_packed_experts_decode_one_matrix_at_a_time():
    numbers = np.random.default_rng(0).standard_normal((3, 4, 64)).astype(np.float32)
    packed = encode(numbers)
    ours = PackedTensor.of(packed)
    assert ours.shape == packed.shape
    assert ours.blocks.data_ptr() == packed.blocks.ctypes.data, "not copied on the CPU"
    np.testing.assert_array_equal(ours.decode(torch.float32, 1).numpy(), packed.decode()[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route_is_best_first_and_ties_go_to_the_lower_index(dtype):
    scores = torch.randint(-2, 3, (500, 128), generator=torch.Generator().manual_seed(0)).to(dtype)
    chosen, share = OPS.route(scores, 4)
    want, want_share = NumpyOps().route(scores.double().numpy(), 4)
    np.testing.assert_array_equal(chosen.numpy(), want)
    assert share.dtype is dtype
    np.testing.assert_allclose(share.double().numpy(), want_share, rtol=2**-8)


def test_norm_and_rope_round_once_in_bfloat16():
    """In float32 inside: the result is the exact one, rounded to bfloat16, to half a unit or so."""
    x = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = torch.linspace(0.5, 2.0, 16)
    exact = NumpyOps().rms_norm(x.double().numpy(), scale.double().numpy(), 1e-5)
    np.testing.assert_allclose(OPS.rms_norm(x, scale, 1e-5).double(), exact, rtol=2**-8)
    positions = torch.tensor([0, 1, 9, 100, 5000, 70_000, 131_071])
    exact = NumpyOps().rope(x.double().numpy(), positions.numpy(), TINY)
    ours = OPS.rope(x, positions, TINY)
    assert ours.dtype is torch.bfloat16
    np.testing.assert_allclose(ours.double(), exact, rtol=2**-8, atol=1e-6)


def test_angles_are_computed_once_for_a_model(monkeypatch, weights):
    calls = []
    real = module.rope_tables
    monkeypatch.setattr(module, "rope_tables", lambda *a: calls.append(1) or real(*a))
    rotations.cache_clear()
    for _ in range(2):
        trace_of(load_backend("torch", TINY, weights.get, dtype="float32"), [text(9)])
    assert len(calls) == 1


def test_only_chosen_experts_are_computed():
    """The others could be full of nothing."""
    w = SimpleNamespace(
        mlp1=torch.randn(4, 64, 32),
        mlp1_bias=torch.randn(4, 64),
        mlp2=torch.randn(4, 32, 32),
        mlp2_bias=torch.randn(4, 32),
    )
    x, chosen, share = torch.randn(5, 32), torch.tensor([[3, 1]] * 5), torch.rand(5, 2)
    before = OPS.experts(x, w, chosen, share, TINY)
    for tensor in vars(w).values():
        tensor[[0, 2]] = torch.nan
    assert torch.equal(OPS.experts(x, w, chosen, share, TINY), before)
    assert OPS.experts(x[:0], w, chosen[:0], share[:0], TINY).shape == (0, 32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_weights_are_borrowed_not_copied(dtype):
    x = np.arange(12).reshape(3, 4).astype(dtype)
    x.flags.writeable = False
    for view in (x, x.T):
        tensor = from_numpy(view)
        assert tensor.data_ptr() == x.ctypes.data
        np.testing.assert_array_equal(tensor.double(), view.astype(np.float64))
    assert from_numpy(x[:0]).shape == (0, 4)


def test_borrowed_memory_outlives_its_array():
    x = np.arange(1000.0)
    x.flags.writeable = False
    tensor = from_numpy(x)
    del x
    np.ones(1000)
    assert tensor[999] == 999


def attention_case(t, n, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (t, 4, 16), (n, 2, 16), (n, 2, 16), (4,)
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 3, 8, 64])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 50])
def test_whole_attention_is_the_reference(n, window):
    q, k, v, sinks = attention_case(n, n)
    tensors = [torch.from_numpy(x).transpose(0, 1)[None] for x in (q, k, v)]
    ours = attend_whole(*tensors, torch.from_numpy(sinks), window)[0].transpose(0, 1)
    np.testing.assert_allclose(ours, attend_row(q, k, v, sinks, window), atol=1e-13)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 64])
@pytest.mark.parametrize(("t", "n"), [(1, 1), (1, 50), (7, 50), (50, 50)])
def test_cached_attention_is_the_reference_however_it_is_cut(monkeypatch, t, n, window):
    q, k, v, sinks = attention_case(t, n)
    zero = torch.zeros(2, 1, 16, dtype=torch.float64)
    keys, values = (torch.cat([zero, torch.from_numpy(x).transpose(0, 1)], 1) for x in (k, v))
    for most in (1, 5, 512):
        monkeypatch.setattr("gptoss.backends.torch.cache.QUERIES", most)
        ours = attend_past(torch.from_numpy(q), keys, values, torch.from_numpy(sinks), window)
        np.testing.assert_allclose(ours, attend_row(q, k, v, sinks, window), atol=1e-13)


def test_packed_rows_of_any_length_attend_within_themselves():
    q, k, v, sinks = attention_case(60, 60)
    lengths = [13, 1, 30, 16]
    ours = FullSequences(lengths).attend(0, *map(torch.from_numpy, (q, k, v, sinks)), 8)
    starts = np.cumsum([0, *lengths])
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        np.testing.assert_allclose(ours[a:b], attend_row(q[a:b], k[a:b], v[a:b], sinks, 8))


def test_bfloat16_stays_within_a_few_of_its_own_roundings():
    """8 units of 2**-8 of each traced value's largest; every expert is chosen, so none can flip."""
    config = replace(TINY, experts_per_token=TINY.num_experts)
    narrow = random_weights(config, dtype=ml_dtypes.bfloat16, scale=0.1)
    exact = {n: w.astype(np.float64) for n, w in narrow.items()}
    rows = [text(30), text(5, seed=9)]
    truth = trace_of(load_backend("reference", config, exact.get, dtype="float64"), rows)
    ours = trace_of(load_backend("torch", config, narrow.get, dtype="bfloat16"), rows)
    for name, true in truth.items():
        if not name.endswith("chosen"):
            error = np.abs(ours[name] - true).max() / np.abs(true).max() * 2**8
            assert error <= 8, f"bfloat16 diverges at {name}: {error:.1f} of its roundings"


def test_bfloat16_weights_are_run_where_they_lie():
    narrow = random_weights(TINY, dtype=ml_dtypes.bfloat16)
    backend = load_backend("torch", TINY, narrow.get)
    assert backend.weights.block[0].attn.qkv.dtype is torch.bfloat16
    for name, ours in [
        ("embedding.weight", backend.weights.embedding),
        ("block.3.mlp.mlp1_weight", backend.weights.block[3].mlp.mlp1),
    ]:
        assert ours.data_ptr() == narrow[name].ctypes.data


@pytest.mark.parametrize(("dtype", "device"), [("float8", "cpu"), ("float32", "tpu")])
def test_a_wrong_dtype_or_device_is_the_callers(weights, dtype, device):
    with pytest.raises(ValueError, match="float8|tpu"):
        load_backend("torch", TINY, weights.get, dtype=dtype, device=device)


def test_a_missing_cuda_device_is_said_in_one_sentence(weights):
    with pytest.raises(BackendUnavailable, match=r"CUDA devices on this machine\.$"):
        load_backend("torch", TINY, weights.get, device="cuda:63")


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_agrees_with_the_cpu(weights, dtype):
    config = replace(TINY, experts_per_token=TINY.num_experts)
    narrow = random_weights(config, dtype=ml_dtypes.bfloat16, scale=0.1)
    rows = [text(30), text(5, seed=9)]
    here, there = (
        trace_of(load_backend("torch", config, narrow.get, dtype=dtype, device=device), rows)
        for device in ("cpu", "cuda")
    )
    for name, true in here.items():
        if not name.endswith("chosen"):
            error = np.abs(there[name] - true).max() / np.abs(true).max()
            assert error <= (2**-4 if dtype == "bfloat16" else 2**-10), name
