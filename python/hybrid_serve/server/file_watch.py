"""Files that are read again when they change: keys and certificates."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)
INTERVAL = 0.4  # seconds


@dataclass(frozen=True)
class Watched:
    """``reload`` raises ValueError or OSError, and leaves everything as it was, for a file that it does not like."""

    name: str
    paths: Sequence[Path]
    reload: Callable[[], None]


async def watch(files: Sequence[Watched], outcomes: Counter[tuple[str, str]]) -> None:
    """Never returns. Looks at times and sizes instead of waiting for events: those do not come from every file system,
    and not at all through the links that cluster managers swap."""
    taken = [await asyncio.to_thread(_signature, each.paths) for each in files]
    last = list(taken)
    while True:
        await asyncio.sleep(INTERVAL)
        for i, each in enumerate(files):
            before, last[i] = last[i], await asyncio.to_thread(_signature, each.paths)
            if last[i] == taken[i] or last[i] != before:  # nothing new, or somebody is writing still
                continue
            taken[i] = last[i]
            try:
                each.reload()
            except (ValueError, OSError) as error:
                log.error("the new %s is not used, the old one stays: %s", each.name, error)
                outcomes[each.name, "refused"] += 1
            except Exception:  # the watch itself goes on
                log.exception("the new %s is not used", each.name)
                outcomes[each.name, "refused"] += 1
            else:
                log.info("%s read again", each.name)
                outcomes[each.name, "ok"] += 1


def _signature(paths: Sequence[Path]) -> list[tuple[int, int, int] | None]:
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return found
