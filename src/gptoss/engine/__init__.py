"""Tokens in, tokens out. Knows no text and no device."""

from gptoss.engine.draw import uniform
from gptoss.engine.engine import STEP_TOKENS, Engine, Stats
from gptoss.engine.request import GREEDY, Constraint, Request
from gptoss.engine.stream import Answer, Drawn, Finish, Listener, Stream

__all__ = [
    "GREEDY",
    "STEP_TOKENS",
    "Answer",
    "Constraint",
    "Drawn",
    "Engine",
    "Finish",
    "Listener",
    "Request",
    "Stats",
    "Stream",
    "uniform",
]
