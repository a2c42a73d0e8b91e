"""The model that is served, and all that its requests share."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

from gptoss.engine.worker import Worker
from gptoss.errors import ContextExceeded
from gptoss.server.metrics import Metrics
from gptoss.text.messages import Message
from gptoss.text.tokenizer import Tokenizer
from gptoss.tools import Toolbox

CALLS, CHARACTERS = 4096, 32 << 20  # remembered at most


class Thoughts:
    """What the model thought before each call of a tool, by the call's id.

    Calls that the server ran on the way, and what came of them, are among it.
    Many clients drop it between a call and its result, and the model then works worse than it can.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Message, ...]] = OrderedDict()
        self._size, self._lock = 0, Lock()

    def keep(self, call: str, thoughts: Sequence[Message]) -> None:
        """Remember; the oldest is forgotten where there are too many."""
        with self._lock:
            self._size += _size(thoughts) - _size(self._kept.pop(call, ()))
            self._kept[call] = tuple(thoughts)
            while len(self._kept) > CALLS or self._size > CHARACTERS:
                self._size -= _size(self._kept.popitem(last=False)[1])

    def before(self, call: str) -> tuple[Message, ...]:
        """Nothing, if the call is not known or forgotten."""
        with self._lock:
            return self._kept.get(call, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One model behind one address."""

    name: str  # the id that answers carry
    tokenizer: Tokenizer
    worker: Worker
    context: int  # most tokens of prompt and answer together
    aliases: frozenset[str] = frozenset()  # other ids that clients may ask for
    timeout: float | None = None  # seconds that one request may take
    tools: Toolbox | None = None  # that are run here for who asks
    metrics: Metrics = field(default_factory=Metrics)
    thoughts: Thoughts = field(default_factory=Thoughts)
    compiling: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    created: int = field(default_factory=lambda: int(time.time()))

    def must_fit(self, texts: Iterable[str]) -> None:
        """Raises ContextExceeded for what is too long at a glance: to tokenize it takes a while."""
        size, most = sum(map(len, texts)), self.context * self.tokenizer.longest
        if size > most:
            raise ContextExceeded(
                f"the prompt has {size} characters, more than {self.context} tokens can say; "
                "there is no room for more (--context)"
            )


def _size(messages: Sequence[Message]) -> int:
    return sum(len(m.content) for m in messages if isinstance(m.content, str))
