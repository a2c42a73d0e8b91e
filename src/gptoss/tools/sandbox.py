"""A shell around a process that nobody trusts: bubblewrap, and limits that the kernel holds.

Inside there is /usr, read-only; /mnt/data, empty, small, in memory, and /tmp within it; no network,
not even loopback; no other process, no environment, nothing of the home folders. As root the
process is started as nobody, because the kernel counts no processes of root.

What rlimits do not count is closed another way: memory that belongs to no address space by a filter
of system calls, memory of all processes together by whoever watches (``memory_of``).
"""

import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gptoss.errors import ToolUnavailable

NOBODY = 65534
PATH = "/usr/local/bin:/usr/bin:/bin"
VISIBLE = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
PROBE = 30  # seconds for the first start
# By architecture as the kernel names it: memfd_create, shmget, memfd_secret, io_uring_setup.
SYSCALLS = {
    "x86_64": (0xC000003E, (319, 29, 447, 425)),
    "aarch64": (0xC00000B7, (279, 194, 447, 425)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a sandbox may take."""

    seconds: float = 120.0  # of one call; the model was trained with this number
    cpu: int = 600  # seconds of one process
    memory: int = 1 << 30  # bytes, of one process and of all together
    disk: int = 64 << 20  # bytes, of /mnt/data and of /dev/shm
    processes: int = 32  # threads count too
    output: int = 16 << 20  # bytes of one call


@dataclass(frozen=True)
class Sandbox:
    """How a Python is started inside. ``python`` and ``limits`` may be chosen."""

    python: str | None = None  # None: the system's
    limits: Limits = Limits()

    def check(self) -> None:
        """Start it once. Raises ToolUnavailable."""
        with started(self) as (command, more):
            command += ["-c", "print(6 * 7)"]
            try:
                ran = subprocess.run(command, capture_output=True, timeout=PROBE, **more)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise _unavailable(str(error)) from None
        if ran.stdout.strip() != b"42":
            said = ran.stderr.decode("utf-8", "replace").strip().splitlines()
            raise _unavailable(said[-1][:300] if said else "it says nothing")

    def command(self, seccomp: int) -> list[str]:
        """Up to the interpreter and its flags; ``seccomp`` is where the filter is read."""
        bwrap = shutil.which("bwrap", path=f"{PATH}:/usr/local/sbin:/usr/sbin")
        if bwrap is None:
            raise ToolUnavailable(
                "the python tool runs code inside bubblewrap only, and there is no `bwrap` here: "
                "install it (Debian and Ubuntu: apt install bubblewrap), or leave the tool out"
            )
        room = ("--size", str(self.limits.disk), "--tmpfs")
        return [
            *(bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"),
            *("--new-session", "--clearenv", "--hostname", "sandbox", "--seccomp", str(seccomp)),
            *("--uid", str(NOBODY), "--gid", str(NOBODY), "--ro-bind", "/usr", "/usr"),
            *_visible(),
            *(word for path in self._prefixes for word in ("--ro-bind", path, path)),
            *("--proc", "/proc", "--dev", "/dev", *room, "/dev/shm", "--remount-ro", "/dev"),
            *(*room, "/mnt/data", "--dir", "/mnt/data/.tmp", "--symlink", "/mnt/data/.tmp", "/tmp"),
            *("--remount-ro", "/", "--chdir", "/mnt/data"),
            *("--setenv", "HOME", "/mnt/data", "--setenv", "PATH", PATH),
            *("--setenv", "LANG", "C.UTF-8", "--setenv", "OPENBLAS_NUM_THREADS", "1"),
            *("--setenv", "OMP_NUM_THREADS", "1", self._interpreter, "-I", "-B", "-u"),
        ]

    @cached_property
    def _interpreter(self) -> str:
        found = self.python or shutil.which("python3", path=PATH)
        if found is None:
            raise ToolUnavailable(
                "the python tool found no python3 in /usr to run inside: name one, python=PATH"
            )
        return str(Path(found).absolute())

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        """Folders beyond /usr that a chosen interpreter needs."""
        if self.python is None:
            return ()
        asked = "import sys; print(sys.prefix, sys.base_prefix, sep='\\n')"
        words = [self.python, "-I", "-c", asked]
        try:
            ran = subprocess.run(words, capture_output=True, timeout=PROBE)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _unavailable(str(error)) from None
        prefixes = dict.fromkeys(ran.stdout.decode("utf-8", "replace").splitlines())
        return tuple(p for p in prefixes if p != "/usr" and not p.startswith("/usr/"))


@contextmanager
def started(sandbox: Sandbox) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The command of an interpreter inside, and what ``subprocess`` is told beside it.

    The filter of system calls is read from a pipe, which is open as long as this is.
    """
    read, write = os.pipe()
    try:
        os.write(write, _filter())
        os.close(write)
        yield sandbox.command(read), {"pass_fds": (read,), **as_nobody()}
    finally:
        os.close(read)


def as_nobody() -> dict[str, Any]:
    """How a process is started: in no folder of interest, and never as root."""
    root = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    return {"cwd": "/", "env": {}, "start_new_session": True, **root}


def memory_of(process: int) -> int:
    """Bytes that a process and all below it hold; what they share counts once."""
    children: dict[int, list[int]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):  # it ended
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(pid)
    below = [process]
    for pid in below:
        below += children.get(pid, [])
    return sum(map(_held, below))


def _held(pid: int) -> int:
    for file, names in (("smaps_rollup", ("Pss",)), ("status", ("RssAnon", "RssShmem"))):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
            told = dict(line.split(":", 1) for line in lines if ":" in line)
            return sum(int(told[n].split()[0]) for n in names if n in told) << 10
    return 0


def _visible() -> Iterator[str]:
    """What the system keeps outside of /usr and programs need."""
    for path in map(Path, VISIBLE):
        if path.is_symlink():
            yield from ("--symlink", os.readlink(path), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    for name in ("ld.so.cache", "alternatives", "localtime"):
        yield from ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")


def _filter() -> bytes:
    """A classic BPF program: foreign architectures are killed, SYSCALLS do not exist.

    On x86_64 numbers from 2**30 are another dialect's; they do not exist either.
    """
    machine = platform.machine()
    if machine not in SYSCALLS:
        raise ToolUnavailable(f"the python tool has no filter for {machine}: leave the tool out")
    audit, closed = SYSCALLS[machine]
    allow, absent, kill = 0x7FFF0000, 0x00050000 | 38, 0x80000000
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), (0x06, 0, 0, kill), (0x20, 0, 0, 0)]
    program += [(0x35, len(closed) + 1, 0, 1 << 30)]
    program += [(0x15, len(closed) - i, 0, number) for i, number in enumerate(closed)]
    program += [(0x06, 0, 0, allow), (0x06, 0, 0, absent)]
    return b"".join(struct.pack("=HBBI", *step) for step in program)


def _unavailable(why: str) -> ToolUnavailable:
    return ToolUnavailable(
        f"the python tool's sandbox does not start here: {why}. Unprivileged user namespaces must "
        "be allowed, and the interpreter must be readable by everybody; or leave the tool out"
    )
