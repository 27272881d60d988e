"""Peers: the API servers at the engine's data socket."""

from __future__ import annotations

import logging
from typing import Any

import zmq

from ..wire import api_identity

log = logging.getLogger(__name__)


class Peers:
    """Which API server is which peer of the socket, and which choices each has running; not what they are about."""

    def __init__(self, socket: zmq.Socket[bytes], count: int) -> None:
        self.socket = socket
        self._index = {api_identity(index): index for index in range(count)}
        self._identities = list(self._index)
        self._joined: set[int] = set()
        self._lost: set[int] = set()
        self.live: list[set[int]] = [set() for _ in range(count)]  # choice ids, by API server
        self.num_joins = 0

    def index_of(self, identity: bytes) -> int | None:
        """None for a stranger, and for an API server that has not joined."""
        index = self._index.get(identity)
        return index if index in self._joined else None

    def join(self, identity: bytes, index: int) -> bool:
        """What an earlier process of that index left behind is lost. False if the identity is not that index's."""
        if self._index.get(identity) != index:
            return False
        if index in self._joined:
            self._lost.add(index)
        self._joined.add(index)
        self.num_joins += 1
        return True

    def send(self, index: int, message: list[Any]) -> None:
        """An API server that is gone is remembered for ``take_lost``."""
        if index not in self._joined:
            return
        try:
            self.socket.send_multipart([self._identities[index], *message], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            if self.live[index]:
                log.warning("API server %d is gone, its %d open choices are aborted", index, len(self.live[index]))
            self._joined.discard(index)
            self._lost.add(index)

    def send_to_all(self, message: list[Any]) -> None:
        for index in list(self._joined):
            self.send(index, message)

    def take_lost(self) -> list[int]:
        """The choice ids that nobody waits for any more."""
        if not self._lost:
            return []
        ids = [id for index in self._lost for id in self.live[index]]
        for index in self._lost:
            self.live[index].clear()
        self._lost.clear()
        return ids
