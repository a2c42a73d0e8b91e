"""What runs inside the sandbox: an interpreter that keeps its names from one call to the next.

Its source is handed to whatever Python is in there, which knows nothing of this package. A line on
stdin is a call, {"code": ..., "mark": ...}; all that is printed goes to stdout, behind a "!" at the
very start, and the mark ends it. Whatever the code does to this process, it does to itself: the
other side believes nothing.
"""

import ast
import json
import linecache
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any


class Late(BaseException):
    """The time of a call is over; no ``except Exception`` catches it."""


def limit(memory: int, file: int, processes: int, cpu: int) -> None:
    """For this process and all it starts; cannot be raised again."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    with open("/proc/self/oom_score_adj", "w") as file_:  # if memory is short, this goes first
        file_.write("1000")


def run(code: str, name: str, names: dict[str, Any]) -> None:
    """One call; the value of a last expression is printed, as a notebook does."""
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    try:
        tree = compile(code, name, "exec", ast.PyCF_ONLY_AST)
        assert isinstance(tree, ast.Module)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            if value is not None:
                names["_"] = value
                print(repr(value))
    except SystemExit as end:
        print(f"SystemExit: {end.code}")
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.stdout.flush()
        traceback.print_exception(type(error), error, trace)


def late(*_: object) -> None:
    """See Late."""
    raise Late("the time of this call is over; what was assigned before is kept")


def end_all_others() -> None:
    """What the code started: everything in here but this process."""
    with suppress(ProcessLookupError):  # nobody is left
        while True:
            os.kill(-1, signal.SIGKILL)
            with suppress(ChildProcessError):
                while True:
                    os.waitpid(-1, 0)


def main() -> None:
    """Serve calls until stdin ends. Arguments: the four of ``limit``, and seconds for a call."""
    *limits, seconds = sys.argv[1:]
    calls = os.fdopen(os.dup(0), encoding="utf-8")
    told = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(1, 2)
    limit(*map(int, limits))
    signal.signal(signal.SIGALRM, late)
    sys.path.insert(0, "")  # modules that the code wrote
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    me = os.getpid()
    os.write(told, b"!")  # here I am
    for count, line in enumerate(calls, 1):
        call = json.loads(line)
        with suppress(Late):  # it may come while an error is being told
            signal.setitimer(signal.ITIMER_REAL, float(seconds))
            run(call["code"], f"<call {count}>", names)
            signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() != me:
            os._exit(0)  # the code forked, and this is the fork
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed by the code
                stream.flush()
        end_all_others()
        os.write(told, call["mark"].encode())


if __name__ == "__main__":
    main()
