import pytest

from gptoss import LLM
from tests.llm.toy import write_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The path of a small random checkpoint with a tokenizer."""
    return write_toy(tmp_path_factory.mktemp("models"))


@pytest.fixture
def llm(toy):
    return LLM.load(toy)
