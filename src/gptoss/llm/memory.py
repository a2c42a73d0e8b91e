"""How much memory a process may still take, as far as the system says."""

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # what version 1 of control groups reports for "no limit" is above


def available_memory() -> int | None:
    """Bytes that can be used without swapping, within the limits of containers. None: unknown."""
    known = [n for n in (_system(), *_containers()) if n is not None]
    return min(known, default=None)


def _system() -> int | None:
    """Of the whole machine; memory that caches files counts, for it is given up on demand."""
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not Linux
        return None


def _containers() -> Iterator[int | None]:
    """What is left under each limit of the control groups this process is in."""
    for line in _lines(PROC / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        inside = path.strip("/")
        if controllers == "":
            for folder in _up(CGROUPS, inside):
                yield _left(folder, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for folder in _up(CGROUPS / "memory", inside):
                yield _left(
                    folder,
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                )


def _up(root: Path, inside: str) -> Iterator[Path]:
    folder = root / inside
    yield folder
    while folder != root:
        folder = folder.parent
        yield folder


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Limit minus usage, where file caches that can be dropped are no usage."""
    most, used = _number(folder / limit), _number(folder / usage)
    if most is None or used is None or most >= UNLIMITED:
        return None
    droppable = 0
    for line in _lines(folder / "memory.stat"):
        if line.startswith(cache + " "):
            droppable = int(line.split()[1])
    return max(0, most - used + droppable)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
