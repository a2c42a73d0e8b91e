"""On what was measured: hardware, versions, and the memory that it took."""

import os
import platform
from pathlib import Path
from typing import Any

PROC = Path("/proc")
LIBRARIES = ("gptoss", "numpy", "torch", "mlx")


def describe() -> dict[str, Any]:
    """What a figure is worthless without."""
    return {
        "machine": {
            "cpu": cpu(),
            "cores": cores(),
            "memory_bytes": memory(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **libraries()},
        "commit": commit(),
    }


def cpu() -> str:
    """The processor's name."""
    for line in lines(PROC / "cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of main memory."""
    for line in lines(PROC / "meminfo"):
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def libraries() -> dict[str, str]:
    """Versions of those that are installed, this package among them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the working copy that this file belongs to; "+" if it has been changed. None: no such."""
    import subprocess

    git = ("git", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True)
        tracked = subprocess.run([*git, "ls-files", __file__], capture_output=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return None
    if head.returncode or not tracked.stdout:
        return None
    return head.stdout.decode().strip() + ("+" if changed.returncode else "")


def peak_memory() -> int | None:
    """Most bytes that this process has had in memory, mapped files included."""
    for line in lines(PROC / "self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def storage_reads() -> int | None:
    """Bytes that this process has made the system fetch from disks, cached ones not."""
    for line in lines(PROC / "self/io"):
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return None


def lines(path: Path) -> list[str]:
    """Of a file that may not be there."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
