"""What API keys have used, over all API servers of one server: requests, tokens, and what runs (P12)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from struct import Struct

from ..shared_memory import KEY_RECORD_BYTES, MOST_LIMITED_KEYS, SharedMemory

_RECORD = Struct("<16s3d")  # digest of the name, requests left, tokens left, when they were counted
_IDLE_SECONDS = 60.0  # after which a bucket without debts is full: the same as no record
assert _RECORD.size == KEY_RECORD_BYTES


@dataclass(slots=True)
class Use:
    """One key at one moment."""

    record: int
    requests_left: float
    tokens_left: float
    num_running: int


class KeyUse:
    """Buckets that fill by the minute, one record a name, and a number of running requests for each record and API
    server. Knows names and numbers; not keys, not what is refused. Every method is one turn at the memory.

    A table with open addresses: a record that is not needed any more is given to another name, never emptied, so that
    no search ends before its goal.
    """

    def __init__(self, memory: SharedMemory, api_index: int) -> None:
        """What an earlier process of this index left running has ended with it."""
        self._memory, self._bytes = memory, memory.uses
        self._own = self._column(api_index)
        self._columns = [self._column(index) for index in range(memory.num_api_servers)]
        self._own[:] = memoryview(bytes(self._own.nbytes)).cast("I")
        self._records: dict[str, tuple[bytes, int]] = {}  # where a name was last

    def look(self, name: str, per_minute: tuple[int, int], now: float) -> Use:
        """``per_minute``: requests and tokens that the buckets hold, 0 for none."""
        with self._memory.turn():
            return self._look(name, per_minute, now)

    def begin(self, name: str, per_minute: tuple[int, int], max_running: int, now: float) -> tuple[Use, bool]:
        """Counts a request that begins, if every limit lets it; what there is now, and whether it was counted."""
        with self._memory.turn():
            use = self._look(name, per_minute, now)
            may = not max_running or use.num_running < max_running
            may = may and (not per_minute[0] or use.requests_left >= 1) and (not per_minute[1] or use.tokens_left >= 1)
            if may:
                use.requests_left -= bool(per_minute[0])
                use.num_running += 1
                self._own[use.record] += 1
                self._write(name, use, now)
            return use, may

    def end(self, name: str, now: float) -> None:
        """A request that ``begin`` counted is over."""
        with self._memory.turn():
            _, record = self._find(name, now)
            self._own[record] = max(0, self._own[record] - 1)

    def spend(self, name: str, per_minute: tuple[int, int], tokens: int, now: float) -> None:
        """Takes tokens, also those that are not there: the next requests wait for them."""
        with self._memory.turn():
            use = self._look(name, per_minute, now)
            use.tokens_left -= tokens
            self._write(name, use, now)

    def _look(self, name: str, per_minute: tuple[int, int], now: float) -> Use:
        digest, record = self._find(name, now)
        there, *left, counted_at = _RECORD.unpack_from(self._bytes, record * _RECORD.size)
        if there != digest:  # it was another's, or nobody's
            left, counted_at = [math.inf, math.inf], now
        requests, tokens = (
            min(full or math.inf, rest + (now - counted_at) * full / 60)
            for rest, full in zip(left, per_minute, strict=True)
        )
        return Use(record, requests, tokens, sum(column[record] for column in self._columns))

    def _write(self, name: str, use: Use, now: float) -> None:
        digest, _ = self._records[name]
        _RECORD.pack_into(self._bytes, use.record * _RECORD.size, digest, use.requests_left, use.tokens_left, now)

    def _find(self, name: str, now: float) -> tuple[bytes, int]:
        """Its digest, and the record that is or would be its own."""
        digest, record = self._records.get(name) or (hashlib.blake2b(name.encode(), digest_size=16).digest(), -1)
        start = record * _RECORD.size
        if record < 0 or self._bytes[start : start + 16] != digest:
            record = self._search(digest, int.from_bytes(digest[:4], "little") % MOST_LIMITED_KEYS, now)
            self._records[name] = digest, record
        return digest, record

    def _search(self, digest: bytes, first: int, now: float) -> int:
        free = -1
        for step in range(MOST_LIMITED_KEYS):
            record = (first + step) % MOST_LIMITED_KEYS
            there, requests_left, tokens_left, counted_at = _RECORD.unpack_from(self._bytes, record * _RECORD.size)
            if there == digest:
                return record
            if not any(there):
                return record if free < 0 else free
            is_full = min(requests_left, tokens_left) >= 0 and now - counted_at > _IDLE_SECONDS
            if free < 0 and is_full and not any(column[record] for column in self._columns):
                free = record
        return first if free < 0 else free  # every record is in use: two names share one

    def _column(self, api_index: int) -> memoryview:
        start = MOST_LIMITED_KEYS * (_RECORD.size + 4 * api_index)
        return self._bytes[start : start + 4 * MOST_LIMITED_KEYS].cast("I")
