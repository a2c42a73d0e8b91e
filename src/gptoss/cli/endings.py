"""How a command ends: for what a user can mend, one sentence and a status, never a traceback."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import ParamSpec

from gptoss.cli.arguments import WrongCommandLine
from gptoss.errors import GptOssError

P = ParamSpec("P")
FULL = "the system has no more memory to give"
_CPU_FULL = "can't allocate memory"  # torch's words; on a GPU it raises OutOfMemoryError


def guarded(run: Callable[P, None]) -> Callable[P, None]:
    """``run``, ending as ``main.py`` says."""

    @wraps(run)
    def inner(*args: P.args, **kwargs: P.kwargs) -> None:
        _furnish()
        try:
            run(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:
            _silence(sys.stdout)
            raise SystemExit(141) from None
        except GptOssError as error:
            raise _failed(str(error)) from None
        except MemoryError:
            raise _failed(FULL) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" and _CPU_FULL not in str(error):
                raise
            raise _failed(FULL) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _failed(f"{where}{error.strerror or error}") from None

    return inner


@contextmanager
def usage() -> Iterator[None]:
    """What is a wrong argument to the library is a wrong command line here."""
    try:
        yield
    except ValueError as error:
        raise WrongCommandLine(str(error)) from None


def _furnish() -> None:
    """Streams that were closed lead nowhere; what an encoding cannot say is replaced."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        with suppress(AttributeError):  # a test's stand-in
            getattr(sys, name).reconfigure(errors="replace")
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))


def _failed(sentence: str) -> SystemExit:
    with suppress(OSError):
        print(f"gptoss: {sentence}", file=sys.stderr)
    return SystemExit(1)


def _silence(stream: object) -> None:
    """What is still buffered for a closed pipe goes nowhere, so that the exit is quiet."""
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]
