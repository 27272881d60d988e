"""Options that can be changed while a server runs, and the one place where their values are: it outlives every child,
so that all API servers agree, those that are started again too (P19)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from struct import Struct
from typing import Any

import msgspec

from .config import Config
from .problems import problems
from .shared_memory import SharedMemory

# Fields of config.py that are read again for every request, and what besides has to be told of a change.
LIVE = (
    "log_level",
    "access_log",
    "log_requests",
    "max_log_len",
    "max_num_seqs",
    "max_num_queued_reqs",
    "max_queue_time_s",
    "ttft_slo_ms",
    "deadline_s",
    "max_request_bytes",
    "max_logprobs",
    "strict_requests",
    "sse_keep_alive_interval",
)
GROUP_OF = {name: group.name for group in fields(Config) for name in vars(getattr(Config(), group.name))}
_HEAD = Struct("<III")  # how often it was changed, bytes of what follows, CRC-32 of both


def value_of(config: Config, name: str) -> Any:
    return getattr(getattr(config, GROUP_OF[name]), name)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with these options instead of its own."""
    for name, value in values.items():
        group = GROUP_OF[name]
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


def live_problems(started_with: Config, wanted: Config) -> list[tuple[str, str]]:
    """What a server that was started with one configuration cannot take of another, as ``problems`` has it."""
    most = started_with.scheduler.max_num_seqs
    found = problems(wanted)
    if most and wanted.scheduler.max_num_seqs > most:
        found.append(("max_num_seqs", f"is {wanted.scheduler.max_num_seqs}, this server has room for {most}"))
    return found


class LiveOptions:
    """The values that were set since the start. Knows names and values, not who reads them; whoever writes has checked
    them."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self._seen = 0

    def news(self) -> dict[str, Any] | None:
        """All values that were ever set, if that has changed since the last call; else None. 0.3 us then."""
        count, length, check = _HEAD.unpack_from(self.memory.live)
        if count == self._seen:
            return None
        data = bytes(self.memory.live[_HEAD.size : _HEAD.size + length])
        if check != _crc(count, data):
            return None  # somebody is writing: the next call sees it whole
        self._seen = count
        values: dict[str, Any] = msgspec.msgpack.decode(data)
        return values

    def change(self, values: Mapping[str, Any]) -> None:
        """Sets these for everybody; ``news`` has them from now on."""
        with self.memory.turn():
            count, length, check = _HEAD.unpack_from(self.memory.live)
            data = bytes(self.memory.live[_HEAD.size : _HEAD.size + length])
            before = msgspec.msgpack.decode(data) if length and check == _crc(count, data) else {}
            data = msgspec.msgpack.encode({**before, **values})
            count = count % (2**32 - 1) + 1
            self.memory.live[: _HEAD.size + len(data)] = _HEAD.pack(count, len(data), _crc(count, data)) + data


def _crc(count: int, data: bytes) -> int:
    return zlib.crc32(data, count)
