"""A grammar and a vocabulary together: which tokens may come next."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss.errors import GptOssError, GrammarError
from gptoss.grammar.formats import Choice, Format
from gptoss.grammar.trial import limits, sentence, trial, vocabulary
from gptoss.grammar.turn import Turn, turn
from gptoss.text.messages import Tool
from gptoss.text.tokenizer import Tokenizer

REMEMBERED = 64  # compiled grammars of one vocabulary, and faults of those that do not compile
NAMES = ("start", "channel", "message", "constrain", "end", "call", "return", "endoftext")


def constrain(
    tokenizer: Tokenizer,
    *,
    format: Format | None = None,
    tools: Sequence[Tool] = (),
    choice: Choice = "auto",
    builtin: Sequence[str] = (),
) -> "Constraint | None":
    """What the model may write after ``<|start|>assistant``; None: anything.

    Args:
        format: of the final answer's body.
        tools: functions; the arguments of those that are ``strict`` follow their parameters, those
            of others are any JSON object.
        choice: "none": no recipient may be written; "auto"; "required": a call must come, and no
            final answer; "functions.NAME": that call must come. Thinking is allowed always.
        builtin: tools the model knows from training, "browser" and "python".

    A schema or grammar that is new takes some 0.1 s, for it is tried in another process first; the
    same again takes microseconds.

    Raises:
        ValueError: a choice without the tool, or a name that no header can have.
        GrammarError: a format or parameters that cannot be held to.
        GptOssError: llguidance is not installed.
    """
    wanted = turn(format=format, tools=tools, choice=choice, builtin=builtin)
    return None if wanted is None else prepare(tokenizer).start(wanted)


def prepare(tokenizer: Tokenizer) -> "Table":
    """The tokenizer's table, built at the first call: about 1 s and 80 MB for o200k's 201,088 ids.

    A server calls this before it says that it is ready. Raises GptOssError without llguidance.
    """
    with _building:
        return _table(tokenizer)


class Constraint:
    """Which tokens the grammar allows next. One answer's; not for several threads at once."""

    def __init__(self, matcher: Any, size: int) -> None:
        """Of a matcher that nobody else uses, over a vocabulary of ``size`` ids."""
        self._matcher, self._size = matcher, size
        self._bits = np.zeros(-(-size // 32), np.int32)
        self._at = self._bits.ctypes.data

    def mask(self) -> npt.NDArray[np.bool_]:
        """[V] true for tokens allowed next, V the tokenizer's ``vocab_size``; a new array.

        After the turn's end this is <|endoftext|> alone. Raises GrammarError where the grammar
        grows beyond its limits.
        """
        self._matcher.unsafe_compute_mask_ptr(self._at, self._bits.nbytes)
        self._check()
        bits = self._bits.view(np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """``token`` is the next one. Raises ValueError if it is not allowed."""
        if self.ended:
            return
        if not 0 <= token < self._size or not self._matcher.try_consume_tokens([token]):
            self._check()
            raise ValueError(f"token {token} is not allowed here")

    def fork(self) -> "Constraint":
        """An independent copy in the same state."""
        return Constraint(self._matcher.deep_copy(), self._size)

    def forced(self) -> list[int]:
        """Tokens that must come next, in this order; empty: there is a choice."""
        tokens = [] if self.ended else self._matcher.compute_ff_tokens()
        self._check()
        return list(tokens)

    @property
    def ended(self) -> bool:
        """Whether the turn is complete."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                "the grammar cannot be followed any further: "
                f"{sentence(self._matcher.get_error())}; make it simpler"
            )


class Table:
    """A vocabulary in llguidance's form, and the grammars that were compiled for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes seconds for a large vocabulary; ``prepare`` remembers it."""
        self.size = tokenizer.vocab_size
        tokens = [tokenizer.decode_bytes([i]) for i in range(self.size)]
        self.specials = [f"<|{name}|>" for name in NAMES]
        nameless = (i for i, token in enumerate(tokens) if token == b"<|reserved_%d|>" % i)
        special = sorted({*tokenizer.specials.values(), *nameless})
        end = tokenizer.special("<|endoftext|>")
        self._table = vocabulary(tokens, special, end, tokenizer.encode)
        self._compiled: OrderedDict[Turn, Any] = OrderedDict()
        self._lock, self._compiling = Lock(), Lock()

    def start(self, wanted: Turn) -> Constraint:
        """At the turn's beginning. Raises GrammarError if it does not compile."""
        found = self._remembered(wanted)
        if found is None:
            with self._compiling:  # one at a time: a stranger's grammar takes one core at most
                found = self._remembered(wanted)
                if found is None:
                    found = self._compile(wanted)
                    self._remember(wanted, found)
        if isinstance(found, str):
            raise GrammarError(found)
        return Constraint(found.deep_copy(), self.size)

    def _compile(self, wanted: Turn) -> Any:
        """A matcher, or what is wrong."""
        from llguidance import LLMatcher

        if wanted.bodies and (fault := trial([*wanted.bodies, wanted.text], self.specials)):
            return fault
        matcher = LLMatcher(self._table, wanted.text, log_level=0, limits=limits())
        return sentence(matcher.get_error()) if matcher.is_error() else matcher

    def _remembered(self, wanted: Turn) -> Any:
        with self._lock:
            if wanted in self._compiled:
                self._compiled.move_to_end(wanted)
            return self._compiled.get(wanted)

    def _remember(self, wanted: Turn, found: Any) -> None:
        with self._lock:
            self._compiled[wanted] = found
            while len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)


_building = Lock()


@lru_cache(maxsize=4)
def _table(tokenizer: Tokenizer) -> Table:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise GptOssError(
            "structured output needs llguidance: install it with `pip install 'gptoss[serve]'`"
        ) from None
    return Table(tokenizer)
