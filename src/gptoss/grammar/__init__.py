"""What the model may write next: one grammar over its whole turn, harmony included.

Needs llguidance (``pip install 'gptoss[serve]'``); importing this room does not.
"""

from gptoss.grammar.constraint import Constraint, constrain, prepare
from gptoss.grammar.formats import Choice, Format, JsonSchema, Lark, Regex, as_choice, as_format

__all__ = [
    "Choice",
    "Constraint",
    "Format",
    "JsonSchema",
    "Lark",
    "Regex",
    "as_choice",
    "as_format",
    "constrain",
    "prepare",
]
