"""How much of this machine's memory can be taken. Knows no torch, so that commands which only count can ask too."""

from __future__ import annotations

from pathlib import Path

import psutil


def free_bytes() -> int:
    """Memory that can be taken without swapping, within the limit of the control group if there is one."""
    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, max(int(text) - int(used.read_text()), 0))
    return available
