"""What the system lets this process have of memory, and how often it has killed for lack of it: from the files of the
control group, version 1 or 2, and of the machine. Knows numbers; ends nobody.

``root``: where the system's files are, for tests.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_VERSIONS = (  # folder of the hierarchy, its controllers in /proc/self/cgroup, files of the limit and of what is used
    ("sys/fs/cgroup", "", "memory.max", "memory.current"),
    ("sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_KILLS = ("memory.events", "memory.oom_control")
_NO_LIMIT = 2**60  # version 1 writes "none" as a number near 2^63


def memory_limit(root: Path = ROOT) -> int:
    """Bytes that the group and those around it may take together, the least of their limits; 0: there is none."""
    return min((limit for limit, _ in _limits(root)), default=0)


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes that this process can still take within the limits of its groups and its own; None: there is none."""
    left = [max(limit - used, 0) for limit, used in _limits(root)]
    if (of_process := address_space_left(root)) is not None:
        left.append(of_process)
    return min(left, default=None)


def address_space_left(root: Path = ROOT) -> int | None:
    """Bytes within ``ulimit -v``; None: it is not set."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    pages = _number(_read(root / "proc/self/statm").split(" ")[0]) or 0
    return max(limit - pages * resource.getpagesize(), 0)


def oom_kills(root: Path = ROOT) -> int | None:
    """Processes of this group that the system has killed for lack of memory, whosever limit it was; of the machine,
    where the group does not say; None: nobody counts them."""
    for folder, *_ in _groups(root):
        for name in _KILLS:
            if (count := _counter(folder / name, "oom_kill")) is not None:
                return count
    return _counter(root / "proc/vmstat", "oom_kill")


def _groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Folder of the group and the files' names, from this process's own group outwards. In a container the path that
    the process is told may be the host's: then what is mounted is its own."""
    lines = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    paths = {controllers: path for _, controllers, path in lines}
    for base, controllers, limit, used in _VERSIONS:
        top = root / base
        own = top / paths.get(controllers, "/").lstrip("/")
        for folder in (own, *own.parents) if own.is_dir() else (top,):
            yield folder, limit, used
            if folder == top:
                break


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of the groups that have a limit."""
    for folder, limit_name, used_name in _groups(root):
        limit, used = _number(_read(folder / limit_name)), _number(_read(folder / used_name))
        if limit is not None and used is not None and limit < _NO_LIMIT:
            yield limit, used


def _counter(file: Path, name: str) -> int | None:
    for line in _read(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _number(value)
    return None


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
