"""Session: which messages between an API server and an engine count.

ZMQ keeps the order of a connection's messages, but makes a broken connection anew in silence, without what was on its
way, and a process that is started again has its predecessor's address. So every message says which session it is of,
its number in it, and its size. A session begins with a JOIN and ends with the next one, or with the first message that
is missing. What was open in it is then asked for again, from where it is (``client.group.EngineGroup``): so each
message has its effect once.
"""

from __future__ import annotations

import struct
import time
from typing import Any, NamedTuple

_STAMP = struct.Struct("<cQQQ")  # 25 bytes: ZMQ keeps so short a frame within its message
_ENDED = -1


class NotNext(ValueError):
    """A message that does not count: it has been taken before, or is of another session."""


class Gap(NotNext):
    """Something is missing before this message, or of it: the session has ended."""


class Stamp(NamedTuple):
    """The first frame of a message."""

    kind: bytes
    session: int
    number: int  # from 0 on, each end has its own
    size: int  # bytes of the frames behind this one

    @classmethod
    def of(cls, frame: bytes) -> Stamp:
        if len(frame) != _STAMP.size:
            raise NotNext(f"a first frame of {len(frame)} bytes")
        return cls(*_STAMP.unpack(frame))


class Session:
    """One end of it: numbers what is sent and says of what comes whether it counts. Knows no kind and no socket."""

    __slots__ = ("_num_sent", "_num_taken", "id")

    def __init__(self, id: int) -> None:
        self.id = id
        self._num_sent = self._num_taken = 0

    def stamped(self, message: list[Any]) -> list[Any]:
        """``message``: see ``wire.pack``. It is to be sent next."""
        self._num_sent += 1
        return stamped(message, self.id, self._num_sent - 1)

    def take(self, stamp: Stamp, frames: list[bytes]) -> None:
        """``frames``: those behind the stamp. Raises NotNext or Gap."""
        if stamp.session != self.id or self._num_taken == _ENDED:
            raise NotNext(f"message {stamp.number} is of session {stamp.session}, which is not the one that runs")
        if stamp.number < self._num_taken:
            raise NotNext(f"message {stamp.number} has come before")
        size = sum(map(len, frames))
        if stamp.number > self._num_taken or stamp.size != size:
            expected, self._num_taken = self._num_taken, _ENDED
            text = f"message {stamp.number} came where {expected} was due, with {size} bytes of {stamp.size}"
            raise Gap(text)
        self._num_taken += 1


def stamped(message: list[Any], session: int, number: int) -> list[Any]:
    kind, *frames = message
    size = sum([memoryview(frame).nbytes for frame in frames])
    return [_STAMP.pack(kind, session, number, size), *frames]


def later_id(than: int) -> int:
    """Of a new session. It is above those of earlier processes, too, unless the clock was set back: then the engine
    says what it must be above."""
    return max(time.time_ns(), than + 1)
