"""How much of this machine's memory can be taken. Knows no torch, so that commands which only count can ask too."""

from __future__ import annotations

from pathlib import Path

import psutil

from .. import control_group


def free_bytes(root: Path = control_group.ROOT) -> int:
    """Memory that can be taken without swapping, within the limits of the control group and of the process, if there
    are any."""
    available, left = int(psutil.virtual_memory().available), control_group.memory_left(root)
    return available if left is None else min(available, left)
