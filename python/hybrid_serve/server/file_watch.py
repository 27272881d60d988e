"""Files that are read again when they change: keys and certificates."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)
INTERVAL = 0.1  # seconds; a file is read when it looks the same twice


_Signature = list[tuple[int, int, int] | None]


@dataclass(frozen=True)
class Watched:
    """``reload`` raises ValueError or OSError, and leaves everything as it was, for a file that it does not like."""

    name: str
    paths: Sequence[Path]
    reload: Callable[[], None]


async def watch(files: Sequence[Watched], outcomes: Counter[tuple[str, str]]) -> None:
    """Never returns. Looks at times and sizes instead of waiting for events: those do not come from every file system,
    and not at all through the links that cluster managers swap."""
    if not files:
        await asyncio.Event().wait()
    taken = last = await asyncio.to_thread(_signatures, files)
    while True:
        await asyncio.sleep(INTERVAL)
        before, last = last, await asyncio.to_thread(_signatures, files)
        for i, each in enumerate(files):
            if last[i] == taken[i] or last[i] != before[i]:  # nothing new, or somebody is writing still
                continue
            taken = [*taken[:i], last[i], *taken[i + 1 :]]
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


def _signatures(files: Sequence[Watched]) -> list[_Signature]:
    return [_signature(each.paths) for each in files]


def _signature(paths: Sequence[Path]) -> _Signature:
    found: _Signature = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return found
