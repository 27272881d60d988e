"""The counts of all API servers in memory that the supervisor owns: one exposition, whichever of them is asked, and
nothing lost when one of them is started again (P22)."""

from __future__ import annotations

import asyncio
import logging
import zlib
from struct import Struct
from typing import TYPE_CHECKING

import msgspec

from ..logging import Lines
from ..shared_memory import COUNTS_SLOT_BYTES
from .metrics import Flat

if TYPE_CHECKING:
    from .context import ServerContext

log = logging.getLogger(__name__)
INTERVAL = 0.25  # seconds
_HEAD = Struct("<II")  # bytes of what follows, its CRC-32
_NUMBER_BYTES = 8  # of the one at the end of a slot
_TRIES = 3  # a reader may meet a writer


class SharedCounts:
    """One slot for each API server, written by it alone and read by all. Knows bytes, not what is counted."""

    def __init__(self, memory: memoryview, index: int) -> None:
        """``memory``: COUNTS_SLOT_BYTES for each API server; ``index``: whose slot is ours."""
        self._memory, self._index, self._num_slots = memory, index, len(memory) // COUNTS_SLOT_BYTES
        step = COUNTS_SLOT_BYTES // _NUMBER_BYTES
        self._connections = memory.cast("q")[step - 1 :: step]
        if not 0 <= index < self._num_slots:
            raise ValueError(f"API server {index} has no slot, there are {self._num_slots}")
        self._last: dict[int, Flat] = {}  # of other slots, for a reader that meets writers only

    def write(self, counts: Flat) -> None:
        data = msgspec.msgpack.encode(counts)
        if _HEAD.size + len(data) > COUNTS_SLOT_BYTES - _NUMBER_BYTES:
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
        return self._connections[self._index]

    @num_connections.setter
    def num_connections(self, count: int) -> None:
        self._connections[self._index] = count

    @property
    def mean_connections(self) -> float:
        """Of all API servers."""
        return sum(self._connections) / self._num_slots

    def _read(self, slot: int) -> Flat:
        start = slot * COUNTS_SLOT_BYTES
        for _ in range(_TRIES):
            length, check = _HEAD.unpack_from(self._memory, start)
            data = bytes(self._memory[start + _HEAD.size : start + _HEAD.size + min(length, COUNTS_SLOT_BYTES)])
            if length and len(data) == length and zlib.crc32(data) == check:
                self._last[slot] = msgspec.msgpack.decode(data, type=Flat)
                break
        return self._last.get(slot, {})


async def publish(shared: SharedCounts, context: ServerContext) -> None:
    """Never returns; what was counted in the last moment is written when it is cancelled. And the other way round: what
    other API servers were told to change is taken up, also where no request comes."""
    metrics = context.metrics
    try:
        while True:
            metrics.num_open = context.num_open()
            metrics.lines_dropped(Lines.num_dropped)
            shared.write(metrics.flat())
            context.take_news()
            await asyncio.sleep(INTERVAL)
    finally:
        metrics.num_open.clear()
        shared.write(metrics.flat())
