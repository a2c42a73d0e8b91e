"""The oracles, offline: they read the vocabulary that the package brings."""

import os

import pytest

from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import o200k_rank_file


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.o200k_harmony()


@pytest.fixture(scope="session")
def rank_folder(tmp_path_factory):
    """A folder with o200k_base.tiktoken."""
    folder = tmp_path_factory.mktemp("o200k")
    (folder / "o200k_base.tiktoken").write_bytes(o200k_rank_file())
    return folder


@pytest.fixture(scope="session")
def harmony(rank_folder):
    """OpenAI's own renderer and parser."""
    import openai_harmony

    before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(rank_folder)
    try:
        name = openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS
        return openai_harmony.load_harmony_encoding(name)
    finally:
        if before is None:
            del os.environ["TIKTOKEN_ENCODINGS_BASE"]
        else:
            os.environ["TIKTOKEN_ENCODINGS_BASE"] = before


NANO_SPECIALS = (
    *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|call|>"),
)


@pytest.fixture(scope="session")
def nano():
    """A vocabulary of 265 tokens: the single bytes, and special ids of its own."""
    specials = {name: 256 + i for i, name in enumerate(NANO_SPECIALS)}
    return Tokenizer({bytes([b]): b for b in range(256)}, specials)
