"""The python tool: one interpreter for each conversation, inside a sandbox.

The model was told in training that it is a notebook that keeps its state, prints the value of a
last expression and stops a call after 120 seconds, and so it is. A call that does not stop when it
is told to, or takes too much, ends the interpreter, and the answer says so.
"""

import asyncio
import json
import os
import secrets
import signal
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path

from gptoss.tools.call import Offer, ToolError, shortened
from gptoss.tools.sandbox import PROBE, Limits, Sandbox, memory_of, started

MOST_TEXT = 10_000  # characters of an answer: the model's context is not for logs
MOST_CODE = 1 << 20  # characters of a call
GRACE = 3.0  # seconds between telling code to stop and ending it
WATCH = 0.2  # seconds between looks at its memory
KERNEL = Path(__file__).with_name("kernel.py")
LOST = (
    "The interpreter was ended, and its variables and files are gone; the next call has a new one."
)


class Python:
    """The tool, switched on."""

    name, offer = "python", Offer(builtin="python")

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    async def start(self) -> None:
        """See Kit.start."""
        await asyncio.to_thread(self.sandbox.check)

    def open(self) -> "Interpreter":
        """See Kit.open."""
        return Interpreter(self.sandbox)

    async def stop(self) -> None:
        """See Kit.stop."""


class Interpreter:
    """One conversation's; it starts with the first call."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox, self._limits = sandbox, sandbox.limits
        self._process: Process | None = None
        self._busy = asyncio.Lock()
        self._unread = bytearray()  # of threads that print between calls

    async def call(self, recipient: str, text: str) -> str:
        """See Opened.call."""
        if len(text) > MOST_CODE:
            raise ToolError(f"the code is longer than {MOST_CODE} characters")
        async with self._busy:
            try:
                printed, fault = await self._run(text)
            except BaseException:  # cancelled: nobody knows what the interpreter is doing
                await self._end()
                raise
            if fault is not None:
                await self._end()
        said = shortened(printed.decode("utf-8", "replace"), MOST_TEXT)
        if fault is None:
            return said or "(no output)"
        raise ToolError("\n".join(filter(None, [said.rstrip(), f"{fault} {LOST}"])))

    async def close(self) -> None:
        """See Opened.close."""
        async with self._busy:
            await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        self._unread.clear()
        if process is not None:
            await end(process)

    async def _run(self, code: str) -> tuple[bytes, str | None]:
        """What it printed; and if it must be ended, why."""
        limits, mark = self._limits, secrets.token_hex(16)
        process = await self._started()
        assert process.stdin is not None
        reading = asyncio.ensure_future(self._read(process, mark.encode()))
        watching = asyncio.ensure_future(_watch(process, limits.memory))
        try:
            process.stdin.write(json.dumps({"code": code, "mark": mark}).encode() + b"\n")
            late = limits.seconds + GRACE
            await asyncio.wait({reading, watching}, timeout=late, return_when="FIRST_COMPLETED")
            if not watching.done():  # after a pause of this process, time and answer are both due
                await asyncio.wait({reading}, timeout=WATCH)
            if reading.done():
                return reading.result()
            taken = bytes(self._unread)
            if watching.done():
                return taken, f"The code took more than {limits.memory >> 20} MiB of memory."
            return taken, f"The code did not stop after {limits.seconds:.0f} seconds."
        finally:
            reading.cancel()
            watching.cancel()
            await asyncio.wait({reading, watching})

    async def _started(self) -> Process:
        if self._process is None:
            starting = asyncio.ensure_future(start(self._sandbox))
            try:
                await asyncio.shield(starting)
            finally:  # whoever is cancelled meanwhile must find it, to end it
                self._process = await starting
        return self._process

    async def _read(self, process: Process, mark: bytes) -> tuple[bytes, str | None]:
        assert process.stdout is not None
        got = self._unread
        while (at := got.find(mark, max(0, len(got) - (1 << 17)))) < 0:
            chunk = await process.stdout.read(1 << 16)
            got += chunk
            if not chunk:
                return bytes(got), "The interpreter ended by itself."
            if len(got) > self._limits.output:
                return bytes(got), f"The code printed more than {self._limits.output >> 20} MiB."
        printed = bytes(got[:at])
        del got[: at + len(mark)]
        return printed, None


async def start(sandbox: Sandbox) -> Process:
    """An interpreter; see ``kernel.py``. Raises ToolError."""
    m: Limits = sandbox.limits
    numbers = (m.memory, m.disk, m.processes, m.cpu, m.seconds)
    with started(sandbox) as (command, more):
        words = [*command, "-c", KERNEL.read_text(encoding="utf-8"), *map(str, numbers)]
        try:
            process = await asyncio.create_subprocess_exec(
                *words, stdin=PIPE, stdout=PIPE, stderr=asyncio.subprocess.DEVNULL, **more
            )
        except OSError as error:
            raise ToolError(f"no interpreter could be started: {error.strerror}") from None
    # Before bubblewrap has set all up, its end is not the end of what is inside.
    assert process.stdout is not None
    reading = asyncio.ensure_future(process.stdout.read(1))
    await asyncio.wait({reading}, timeout=PROBE)
    if not reading.done() or reading.result() != b"!":
        reading.cancel()
        await asyncio.wait({reading})
        await end(process)
        raise ToolError("no interpreter could be started")
    return process


async def end(process: Process) -> None:
    """Kill it, and all that is inside."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdin is not None
    process.stdin.close()
    await process.communicate()  # reads to the end: the pipes are closed then


async def _watch(process: Process, most: int) -> None:
    """Returns when it holds more."""
    while memory_of(process.pid) <= most:
        await asyncio.sleep(WATCH)
