"""The counts of all API servers in memory that the supervisor owns: one exposition, whichever of them is asked, and
nothing lost when one of them is started again (P22)."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import zlib
from collections.abc import Callable
from struct import Struct

import msgspec

from ..wire import COUNTS_SLOT_BYTES
from .metrics import Flat, Metrics

log = logging.getLogger(__name__)
INTERVAL = 0.25  # seconds
_HEAD = Struct("<II")  # bytes of what follows, its CRC-32
_CONNECTIONS = Struct("<q")  # at the end of a slot
_TRIES = 3  # a reader may meet a writer


class SharedCounts:
    """One slot for each API server, written by it alone and read by all. Knows bytes, not what is counted."""

    def __init__(self, fd: int, index: int) -> None:
        """``fd``: memory of COUNTS_SLOT_BYTES for each API server; ``index``: whose slot is ours."""
        self._index, self._num_slots = index, os.fstat(fd).st_size // COUNTS_SLOT_BYTES
        if not 0 <= index < self._num_slots:
            raise ValueError(f"API server {index} has no slot, there are {self._num_slots}")
        self._memory = mmap.mmap(fd, self._num_slots * COUNTS_SLOT_BYTES)
        self._last: dict[int, Flat] = {}  # of other slots, for a reader that meets writers only

    def write(self, counts: Flat) -> None:
        data = msgspec.msgpack.encode(counts)
        if _HEAD.size + len(data) > COUNTS_SLOT_BYTES - _CONNECTIONS.size:
            log.error("the counts have %d bytes and do not fit a slot of %d", len(data), COUNTS_SLOT_BYTES)
            return
        start = self._index * COUNTS_SLOT_BYTES
        self._memory[start : start + _HEAD.size + len(data)] = _HEAD.pack(len(data), zlib.crc32(data)) + data

    def own(self) -> Flat:
        """What an earlier process of our index has left."""
        return self._read(self._index)

    def others(self) -> list[Flat]:
        return [self._read(slot) for slot in range(self._num_slots) if slot != self._index]

    @property
    def num_connections(self) -> int:
        """Ours, open at this moment, as others see it."""
        return self._num_connections(self._index)

    @num_connections.setter
    def num_connections(self, count: int) -> None:
        _CONNECTIONS.pack_into(self._memory, (self._index + 1) * COUNTS_SLOT_BYTES - _CONNECTIONS.size, count)

    @property
    def least_connections(self) -> int:
        """Of the API server that has the fewest."""
        return min(self._num_connections(slot) for slot in range(self._num_slots))

    def _num_connections(self, slot: int) -> int:
        count: int = _CONNECTIONS.unpack_from(self._memory, (slot + 1) * COUNTS_SLOT_BYTES - _CONNECTIONS.size)[0]
        return count

    def _read(self, slot: int) -> Flat:
        start = slot * COUNTS_SLOT_BYTES
        for _ in range(_TRIES):
            length, check = _HEAD.unpack_from(self._memory, start)
            data = self._memory[start + _HEAD.size : start + _HEAD.size + min(length, COUNTS_SLOT_BYTES)]
            if length and len(data) == length and zlib.crc32(data) == check:
                self._last[slot] = msgspec.msgpack.decode(data, type=Flat)
                break
        return self._last.get(slot, {})

    def close(self) -> None:
        self._memory.close()


async def publish(shared: SharedCounts, metrics: Metrics, num_open: Callable[[], int]) -> None:
    """Never returns; what was counted in the last moment is written when it is cancelled."""
    try:
        while True:
            metrics.num_open = num_open()
            shared.write(metrics.flat())
            await asyncio.sleep(INTERVAL)
    finally:
        metrics.num_open = 0
        shared.write(metrics.flat())
