"""Opening a room on a machine that lacks what it needs."""

import sys
from types import SimpleNamespace

import pytest

from gptoss.backends import has_native, load_backend
from gptoss.errors import BackendUnavailable


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A function that puts a torch with this source in place of the real one."""

    def put(source):
        for name in list(sys.modules):
            if name == "torch" or name.startswith("gptoss.backends.torch"):
                monkeypatch.delitem(sys.modules, name)
        (tmp_path / "torch.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return put


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("raise ImportError('undefined symbol: iJIT_NotifyEvent')", "iJIT_NotifyEvent"),
        ("import a_part_of_torch_that_is_gone", "a_part_of_torch_that_is_gone"),
        ("", "Tensor"),
    ],
)
def test_a_broken_torch_is_told_with_its_own_words(broken, tiny, weights, source, said):
    broken(source)
    with pytest.raises(BackendUnavailable, match=rf"importing it fails: .*{said}"):
        load_backend("torch", tiny, weights.get)


def test_a_missing_torch_is_told_with_what_to_install(broken, monkeypatch, tiny, weights):
    broken("")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'gptoss\[torch\]'"):
        load_backend("torch", tiny, weights.get)


@pytest.fixture
def without(monkeypatch):
    """A function that makes importing a room fail with this error."""

    def put(room, error):
        class Room:
            def find_spec(self, name, path=None, target=None):
                if name == room:
                    raise error

        monkeypatch.delitem(sys.modules, room, raising=False)
        monkeypatch.delattr(room, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Room(), *sys.meta_path])

    return put


@pytest.fixture
def native(monkeypatch):
    """A function that puts a module, or an error of importing it, in place of the native room."""

    def put(found):
        class Room:
            def find_spec(self, name, path=None, target=None):
                if name == "gptoss.backends.native":
                    raise found

        monkeypatch.delitem(sys.modules, "gptoss.backends.native", raising=False)
        monkeypatch.delattr("gptoss.backends.native", raising=False)
        if isinstance(found, ImportError):
            monkeypatch.setattr(sys, "meta_path", [Room(), *sys.meta_path])
        else:
            monkeypatch.setitem(sys.modules, "gptoss.backends.native", found)

    return put


@pytest.mark.parametrize(
    "error, said",
    [
        (ModuleNotFoundError("No module", name="gptoss._core"), "this installation lacks"),
        (ImportError("cannot import name '_core'", name="gptoss"), "this installation lacks"),
        (ImportError("undefined symbol: x", name="gptoss._core"), "importing it fails: undefined"),
    ],
)
def test_a_missing_core_is_told_with_what_to_install(native, tiny, weights, error, said):
    native(error)
    assert not has_native()
    with pytest.raises(BackendUnavailable, match=f"compiled core.*{said}"):
        load_backend("native", tiny, weights.get)


def test_a_fault_of_the_native_room_is_not_put_on_the_core(native, tiny, weights):
    native(ModuleNotFoundError("No module", name="gptoss.backends.native.part"))
    with pytest.raises(ModuleNotFoundError):
        load_backend("native", tiny, weights.get)


def test_precision_and_threads_reach_the_native_room(native, tiny, weights):
    native(SimpleNamespace(NativeBackend=lambda *args: args))
    assert has_native()
    read = weights.get
    assert load_backend("native", tiny, read) == (tiny, read, "fast", None, None, None)
    given = {"precision": "exact", "threads": 2, "kv": "int8", "resident": 9}
    assert load_backend("native", tiny, read, **given) == (tiny, read, "exact", 2, "int8", 9)


@pytest.mark.parametrize(
    "name, wrong, said",
    [
        ("native", {"dtype": "float32"}, "takes no dtype"),
        ("native", {"precision": "finest"}, "one of exact, fast"),
        ("native", {"threads": 0}, "at least 1"),
        ("native", {"kv": "int4"}, "one of bfloat16, float32, int8"),
        ("native", {"device": "cuda"}, "on the cpu"),
        ("reference", {"precision": "exact"}, "reference backend takes no precision"),
        ("torch", {"precision": "fast"}, "torch backend takes no precision"),
        ("torch", {"threads": 2}, "threads"),
        ("torch", {"resident": 2}, "keeps within a given memory"),
        ("mlx", {"threads": 2}, "threads"),
        ("mlx", {"kv": "float32"}, "in its dtype or int8, not in float32"),
        ("mlx", {"precision": "finest"}, "of mlx one of exact, fast, small"),
        ("native", {"precision": "small"}, "of native one of exact, fast"),
        ("tpu", {}, "one of reference, native, torch"),
    ],
)
def test_an_option_of_another_room_is_refused(tiny, weights, name, wrong, said):
    with pytest.raises(ValueError, match=said):
        load_backend(name, tiny, weights.get, **wrong)


@pytest.mark.parametrize(
    "error, said",
    [
        (ModuleNotFoundError("No module", name="mlx"), r"pip install 'gptoss\[mlx\]'"),
        (ModuleNotFoundError("No module", name="mlx.core"), r"pip install 'gptoss\[mlx\]'"),
        (ImportError("libopenblas.so.0: not found"), "importing it fails: libopenblas"),
    ],
)
def test_a_missing_or_broken_mlx_is_told(without, tiny, weights, error, said):
    without("gptoss.backends.mlx", error)
    with pytest.raises(BackendUnavailable, match=said):
        load_backend("mlx", tiny, weights.get)


def test_a_fault_of_the_mlx_room_is_not_put_on_mlx(without, tiny, weights):
    without("gptoss.backends.mlx", ModuleNotFoundError("No", name="gptoss.backends.mlx.part"))
    with pytest.raises(ModuleNotFoundError):
        load_backend("mlx", tiny, weights.get)


def test_a_fault_of_our_own_is_not_put_on_torch(monkeypatch, tiny, weights):
    monkeypatch.setitem(sys.modules, "gptoss.backends.torch", None)
    with pytest.raises(ModuleNotFoundError, match="gptoss"):
        load_backend("torch", tiny, weights.get)
