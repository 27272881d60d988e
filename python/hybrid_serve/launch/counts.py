"""The memory of a server's counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..wire import COUNTS_SLOT_BYTES


@contextmanager
def shared_counts(num_api_servers: int) -> Iterator[int]:
    """File descriptor of memory where API servers keep their counts; they come and go, it stays."""
    fd = os.memfd_create("hybrid-serve-counts")
    try:
        os.ftruncate(fd, num_api_servers * COUNTS_SLOT_BYTES)
        yield fd
    finally:
        os.close(fd)
