"""The front room: a model by its name or path, ready to talk to."""

from gptoss.llm.llm import LLM
from gptoss.llm.plan import Plan
from gptoss.llm.reply import Reply, Stream, Usage
from gptoss.llm.tokens import TokenGenerator

__all__ = ["LLM", "Plan", "Reply", "Stream", "TokenGenerator", "Usage"]
