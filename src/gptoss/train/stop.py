"""Signals that ask a run to end: the first lets it keep what it has, a second one ends it at once.

A scheduler that wants its machine back sends SIGTERM, a person at the keyboard Ctrl-C (SIGINT).
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

TWICE = 1.0  # seconds within which two signals are one that came by two ways


class Stopped(KeyboardInterrupt):
    """A run was asked to end, and is kept. ``number``: the signal."""

    def __init__(self, number: int, path: Path, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{path}: stopped by {name} after step {step}; the same command goes on")
        self.number = number


class Stop:
    """Who listens for signals, and what has been heard."""

    def __init__(self) -> None:
        self.number: int | None = None  # the signal that asked
        self._heard_at = 0.0
        self._may_leave = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen; only Python's main thread can. Signals that were to be ignored still are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {n: signal.getsignal(n) for n in numbers}
        before = {n: h for n, h in before.items() if h not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What may be left half done: a signal raises KeyboardInterrupt here."""
        self._may_leave = True
        try:
            yield
        finally:
            self._may_leave = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._heard_at = number, now
            if self._may_leave:
                raise KeyboardInterrupt
        elif now - self._heard_at > TWICE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
