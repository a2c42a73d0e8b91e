"""The kit's model and what is asked of it, once for all tests of the room."""

import pytest

from gptoss.backends import load_backend
from gptoss.llm.models import NANO
from gptoss.model.weights import specs
from gptoss.text.tokenizer import Tokenizer
from gptoss.verify.patients import local
from gptoss.verify.probes import PROBE, probe_weights, prompts

LENGTHS = (1, 3, 5, 13, 130, 150, 200, 300)  # a part of the kit's, for time
REST = [  # what we ship beside the usual
    ("reference", {"dtype": "float64"}),
    ("native", {"precision": "exact", "kv": "bfloat16"}),
    ("native", {"precision": "exact", "kv": "int8"}),
    ("native", {"precision": "fast", "kv": "float32"}),
    ("torch", {"dtype": "float64"}),
    ("mlx", {"dtype": "float32", "device": "cpu"}),
    ("mlx", {"dtype": "bfloat16", "device": "cpu"}),
    ("mlx", {"dtype": "float32", "device": "cpu", "precision": "fast"}),
    ("mlx", {"dtype": "float32", "device": "cpu", "precision": "small"}),
    ("mlx", {"dtype": "bfloat16", "device": "cpu", "kv": "int8"}),
]


@pytest.fixture(scope="session")
def probe():
    """Canonical tensors of the kit's checkpoint, by name."""
    read = probe_weights()
    return {spec.name: read(spec.name) for spec in specs(PROBE)}


@pytest.fixture(scope="session")
def tokenizer():
    """The vocabulary of nano."""
    return Tokenizer.from_file(NANO / "tokenizer.json")


@pytest.fixture(scope="session")
def asked(tokenizer):
    """Texts of the kit, in tokens."""
    return [tokenizer.encode(text) for text in prompts(tokenizer, LENGTHS)]


@pytest.fixture(scope="session")
def seen(probe, asked):
    """What the reference makes of them."""
    patient = local(load_backend("reference", PROBE, probe.__getitem__))
    return [patient(prompt) for prompt in asked]
