import os
import signal

import numpy as np
import pytest
from hypothesis import settings

from gptoss.model.config import ModelConfig
from gptoss.model.weights import random_weights

# How long an example takes depends on what else is running; only its answer is tested here.
# CI draws the same examples every time: a change is judged by what it changed.
settings.register_profile("untimed", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("untimed")

# What a shell starts in the background is told to ignore Ctrl-C, and so would be what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = ModelConfig(
    num_hidden_layers=4,
    hidden_size=32,
    vocab_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    experts_per_token=2,
    intermediate_size=32,
    sliding_window=8,
)


@pytest.fixture(scope="session")
def tiny():
    """A model whose every part is there and whose window is soon passed."""
    return TINY


@pytest.fixture(scope="session")
def weights():
    """Its tensors by canonical name, float32."""
    return random_weights(TINY)


@pytest.fixture(scope="session")
def weights64():
    """The same numbers in float64."""
    return random_weights(TINY, dtype=np.float64)
