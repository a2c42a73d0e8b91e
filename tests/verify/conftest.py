"""The kit's model and what is asked of it, once for all tests of the room."""

import pytest

from gptoss.llm.models import NANO
from gptoss.model.weights import specs
from gptoss.text.tokenizer import Tokenizer
from gptoss.verify.probes import PROBE, probe_weights


@pytest.fixture(scope="session")
def probe():
    """Canonical tensors of the kit's checkpoint, by name."""
    read = probe_weights()
    return {spec.name: read(spec.name) for spec in specs(PROBE)}


@pytest.fixture(scope="session")
def tokenizer():
    """The vocabulary of nano."""
    return Tokenizer.from_file(NANO / "tokenizer.json")
