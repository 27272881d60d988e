"""How much of this machine's memory can be taken. Knows no torch, so that commands which only count can ask too."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from .. import control_group


def free_bytes(root: Path = control_group.ROOT) -> int:
    """Memory that can be taken without swapping, within the limits of the control group and of the process, if there
    are any."""
    try:
        available = int(psutil.virtual_memory().available)
    except (OSError, KeyError):  # no /proc/meminfo, or not all of it; this leaves out what files are cached in
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    left = control_group.memory_left(root)
    return available if left is None else min(available, left)
