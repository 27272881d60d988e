"""Control: one API server's line to the supervisor."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from .. import __version__
from ..config import Config
from ..wire import PROTOCOL_VERSION, Empty, Hello, Kind, ModelState, Refused, Status, pack, unpack
from .dealers import Dealers


class Control:
    """Says HELLO and hands on what comes: ``on_status`` with every news of an engine, ``on_model`` with every news of
    one of several models, ``on_refused`` with the strangers at the port for headless engines, ``on_shutdown(again)``
    when the server shall end. Knows no engine."""

    def __init__(self, config: Config, api_index: int, address: str, dealers: Dealers) -> None:
        self._config, self._index, self._address, self._dealers = config, api_index, address, dealers
        self.on_status: Callable[[Status], None] = lambda status: None
        self.on_model: Callable[[ModelState], None] = lambda state: None
        self.on_refused: Callable[[int], None] = lambda num: None
        self.on_shutdown: Callable[[bool], None] = lambda again: None
        self._num_shutdowns = 0

    def start(self) -> None:
        self._socket = self._dealers.open(self._address, self._take)
        hello = Hello("api", self._index, os.getpid(), PROTOCOL_VERSION, __version__, self._config.digest())
        self.say(Kind.HELLO, hello)

    def say(self, kind: bytes, header: msgspec.Struct) -> None:
        self._dealers.send(self._socket, pack(kind, header))

    def say_ready(self) -> None:
        self.say(Kind.READY, Empty())

    def _take(self, frames: list[bytes]) -> None:
        kind = frames[0]
        if kind == Kind.STATUS:
            self.on_status(unpack(frames[1], Status))
        elif kind == Kind.MODEL:
            self.on_model(unpack(frames[1], ModelState))
        elif kind == Kind.REFUSED:
            self.on_refused(unpack(frames[1], Refused).num)
        elif kind == Kind.SHUTDOWN:
            self._num_shutdowns += 1
            self.on_shutdown(self._num_shutdowns > 1)
        else:
            raise ValueError(f"unknown kind {kind!r}")
