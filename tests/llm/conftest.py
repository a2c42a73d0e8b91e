import pytest

from gptoss import LLM
from gptoss.backends import has_native
from tests.llm.toy import write_toy

needs_native = pytest.mark.skipif(
    not has_native(), reason="gptoss was installed without its compiled core"
)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The path of a small random checkpoint with a tokenizer."""
    return write_toy(tmp_path_factory.mktemp("models"))


@pytest.fixture
def llm(toy):
    return LLM.load(toy)
