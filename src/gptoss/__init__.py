"""gpt-oss, from the numbers to the conversation. These names are promised; nothing else is."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss.checkpoint.open import open_checkpoint
    from gptoss.errors import GptOssError
    from gptoss.llm import LLM, Reply, TokenGenerator
    from gptoss.model.config import ModelConfig
    from gptoss.text.messages import Developer, Message, System, Tool
    from gptoss.text.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Developer",
    "GptOssError",
    "Message",
    "ModelConfig",
    "Reply",
    "System",
    "TokenGenerator",
    "Tokenizer",
    "Tool",
    "open_checkpoint",
]
_HOMES = {
    "LLM": "gptoss.llm",
    "Reply": "gptoss.llm",
    "TokenGenerator": "gptoss.llm",
    "Developer": "gptoss.text.messages",
    "Message": "gptoss.text.messages",
    "System": "gptoss.text.messages",
    "Tool": "gptoss.text.messages",
    "Tokenizer": "gptoss.text.tokenizer",
    "ModelConfig": "gptoss.model.config",
    "GptOssError": "gptoss.errors",
    "open_checkpoint": "gptoss.checkpoint.open",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: ``import gptoss`` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gptoss' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
