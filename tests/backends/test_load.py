"""Opening a room on a machine that lacks what it needs."""

import sys

import pytest

from gptoss.backends import load_backend
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


def test_a_fault_of_our_own_is_not_put_on_torch(monkeypatch, tiny, weights):
    monkeypatch.setitem(sys.modules, "gptoss.backends.torch", None)
    with pytest.raises(ModuleNotFoundError, match="gptoss"):
        load_backend("torch", tiny, weights.get)
