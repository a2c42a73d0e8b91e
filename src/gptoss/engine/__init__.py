"""Tokens in, tokens out. Knows no text and no device."""

from gptoss.engine.generate import Drawn, Generator, uniform

__all__ = ["Drawn", "Generator", "uniform"]
