"""Errors that stop a start-up: one class, raised where the cause is known, shown once, as a box, at the end.

Codes and exit codes are those of catalogue.py; the exit code tells a script the class of the cause: 2 usage, 10 model
not found, 11 model corrupt, 12 does not fit in memory, 13 port busy, 14 unsafe file modes, 20 engine failed.
"""

from __future__ import annotations

import errno
import re

from .catalogue import FAULTS
from .control_group import address_space_left, memory_limit
from .wire import StartupFailure

# How others say that the system gave no memory, where it is no MemoryError: torch, the loader of libraries, threads.
_NO_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|failed to map segment|can't start new thread", re.I
)


class StartupError(Exception):
    """``what`` happened, ``why``, and the ``fix`` as something to type or change; each one line, no paths of ours.
    ``exit_code``: None for the catalogue's, which any other must have a reason to differ from."""

    def __init__(self, code: str, what: str, why: str, fix: str, exit_code: int | None = None) -> None:
        super().__init__(f"{code}: {what}: {why}")
        exit_code = FAULTS[code].exit_code if exit_code is None else exit_code
        self.failure = StartupFailure(code, what, why, fix, exit_code)

    @classmethod
    def of(cls, failure: StartupFailure, exit_code: int | None = None) -> StartupError:
        """What another process said. ``exit_code``: None for the failure's own."""
        exit_code = failure.exit_code if exit_code is None else exit_code
        return cls(failure.code, failure.what, failure.why, failure.fix, exit_code)


def box(failure: StartupFailure) -> str:
    """The failure as the last lines that a failed start prints."""
    lines = [f"{failure.code}  {failure.what}", f"why   {failure.why}", f"fix   {failure.fix}"]
    width = max(len(line) for part in lines for line in part.splitlines())
    bar = "-" * width
    return "\n".join([bar, *lines, bar])


def lack_of_memory(who: str, error: BaseException, cache_bytes: int = 0) -> StartupError | None:
    """For an allocation that failed although the plan had room, as under ``ulimit -v``; None: the error is another one.
    ``cache_bytes``: what the KV cache may take."""
    is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_told = isinstance(error, StartupError)
    if is_told or not (isinstance(error, MemoryError) or is_refused or _NO_MEMORY.search(str(error))):
        return None
    left, limit = address_space_left(), memory_limit()
    wanted = re.search(r"(\d{5,}) bytes", str(error))
    why = f"the system gave it no {mib(int(wanted[1]))}" if wanted else "the system gave it no more"
    if left is not None:
        why += f"; its address space (ulimit -v) has {mib(left)} left"
    if limit:
        why += f"; its control group may take {mib(limit)}"
    more = "ulimit -v unlimited" if left is not None else "more memory"
    what = f"{who} has too little memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return StartupError("HS-E026", what[:200], why, f"{smaller_cache(cache_bytes)}, or {more}")


def smaller_cache(cache_bytes: int) -> str:
    """What to type. As the pages of a cache are taken when they are first written, nobody knows how much of it there
    was when memory ended: half of it leaves room."""
    if not cache_bytes:
        return "a smaller model or --kv-cache-memory-bytes (hybrid-serve fit MODEL counts)"
    return f"--kv-cache-memory-bytes {mib(cache_bytes // 2).replace(' ', '')} (it was {mib(cache_bytes)})"


def mib(num_bytes: int) -> str:
    return f"{num_bytes // 2**20} MiB" if num_bytes >= 2**20 else f"{num_bytes // 2**10} KiB"
