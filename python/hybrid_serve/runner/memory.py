"""How much of this machine's memory can be taken. Knows no torch, so that commands which only count can ask too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def free_bytes() -> int:
    """Memory that can be taken without swapping, within the limit of the control group if there is one."""
    try:
        available: int = psutil.virtual_memory().available
    except (OSError, KeyError):  # no /proc/meminfo, or not all of it; this leaves out what files are cached in
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):  # no limit, or not to be seen
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit.isdigit():
            available = min(available, max(int(limit) - int(used), 0))
    return available
