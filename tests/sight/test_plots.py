import importlib.util
import struct

import numpy as np
import pytest

from gptoss.errors import BackendUnavailable
from gptoss.sight.plots import plots, routed

NAMES = ["surprise", "lens", "sinks", "routing"]


def test_four_plots_are_written(nano, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "a" / "b"
    paths = list(plots(nano.sight, nano.tokenizer, folder))
    assert sorted(folder.iterdir()) == sorted(paths)
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for path in paths:
        raw = path.read_bytes()
        assert raw.startswith(b"\x89PNG")
        wide, high = struct.unpack(">II", raw[16:24])
        assert min(wide, high) > 200 and max(wide, high) < 5000


def test_routing_shares_sum_to_one_in_each_layer(nano):
    shares = routed(nano.sight, [3, 4, 5])
    assert shares.shape == (4, 8)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
    alone = routed(nano.sight, [7])[2]
    assert alone.argmax() == nano.sight.chosen[7, 2, 0] and (alone > 0).sum() == 2


def test_without_matplotlib_it_says_what_to_install(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"gptoss\[plots\]"):
        list(plots(nano.sight, nano.tokenizer, tmp_path / "none"))
    assert not (tmp_path / "none").exists()
