"""The memory that the processes of one server share. The supervisor owns it: API servers come and go, it stays."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import StartupError

LIVE_BYTES = 2**16
COUNTS_SLOT_BYTES = 2**20  # for each API server; pages that nobody writes cost nothing
OPEN_SLOT_BYTES = 2**16  # as well
MOST_LIMITED_KEYS = 2**15  # more than a key file of its largest size can have
KEY_RECORD_BYTES = 40
TURN_SECONDS = 0.05


def num_bytes(num_api_servers: int) -> int:
    uses = MOST_LIMITED_KEYS * (KEY_RECORD_BYTES + 4 * num_api_servers)
    return LIVE_BYTES + num_api_servers * (COUNTS_SLOT_BYTES + OPEN_SLOT_BYTES) + uses


def anonymous_file(name: str) -> int:
    """A file descriptor of memory, in no folder, that goes when the last process closes it. Raises StartupError."""
    if not hasattr(os, "memfd_create"):  # not Linux
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    try:
        return os.memfd_create(name)
    except OSError as error:
        what, why = "the system gives no memory for processes to share", f"memfd_create: {error.strerror}"
        fix = "allow the system call memfd_create, in a container by its seccomp profile"
        raise StartupError("HS-E033", what, why, fix) from error


def make(num_api_servers: int) -> int:
    """A file descriptor of memory for so many API servers, all zero, that goes when the last process closes it."""
    fd = anonymous_file("hybrid-serve-shared")
    os.ftruncate(fd, num_bytes(num_api_servers))
    return fd


@contextmanager
def shared(num_api_servers: int) -> Iterator[int]:
    """``make`` for as long as the block runs."""
    fd = make(num_api_servers)
    try:
        yield fd
    finally:
        os.close(fd)


class SharedMemory:
    """Its parts, and taking turns at them. Knows where things are, not what they mean: ``live`` is ``LiveOptions``',
    ``counts`` ``SharedCounts``', ``open`` ``OpenCounts``', ``uses`` ``KeyUse``'s."""

    def __init__(self, fd: int, num_api_servers: int) -> None:
        """``fd``: see ``make``; closed by whoever opened it, when nobody takes turns any more."""
        self._fd, self.num_api_servers = fd, num_api_servers
        whole = memoryview(mmap.mmap(fd, num_bytes(num_api_servers)))
        counts_end = LIVE_BYTES + num_api_servers * COUNTS_SLOT_BYTES
        open_end = counts_end + num_api_servers * OPEN_SLOT_BYTES
        self.live, self.counts = whole[:LIVE_BYTES], whole[LIVE_BYTES:counts_end]
        self.open, self.uses = whole[counts_end:open_end], whole[open_end:]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One process at a time is in such a block, microseconds long. The kernel ends the turn of a process that dies
        in one; one that is stopped there is not waited for longer than TURN_SECONDS."""
        end = 0.0
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
                break
            except OSError:
                now = time.monotonic()
                end = end or now + TURN_SECONDS
                if now >= end:
                    break
                time.sleep(0)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)
