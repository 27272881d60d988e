"""Peers: the API servers at the engine's data socket."""

from __future__ import annotations

import logging
from typing import Any

import zmq

from ..session import Gap, NotNext, Session, Stamp, stamped
from ..wire import Kind, Reset, api_identity, pack

log = logging.getLogger(__name__)


class Peers:
    """Which API server is which peer of the socket, the session that runs with each, and which choices each has
    running; not what they are about."""

    def __init__(self, socket: zmq.Socket[bytes], count: int) -> None:
        self.socket = socket
        self._index = {api_identity(index): index for index in range(count)}
        self._identities = list(self._index)
        self._sessions: list[Session | None] = [None] * count
        self._latest = [0] * count  # ids of sessions
        self._lost: set[int] = set()
        self.live: list[set[int]] = [set() for _ in range(count)]  # choice ids, by API server
        self.num_joins = self.num_checks = 0  # who is to hear of us, also if there is nothing new

    def join(self, identity: bytes, index: int, stamp: Stamp, frames: list[bytes]) -> bool:
        """A session begins; what an earlier one of that index left behind is lost. False if the identity is not that
        index's. Raises as ``take``."""
        if self._index.get(identity) != index:
            return False
        if stamp.session <= self._latest[index]:
            self.take(identity, stamp, frames)
            raise NotNext("a JOIN within a session")
        session = Session(stamp.session)
        session.take(stamp, frames)
        self._lose(index)
        self._sessions[index], self._latest[index] = session, session.id
        self.num_joins += 1
        return True

    def take(self, identity: bytes, stamp: Stamp, frames: list[bytes]) -> int:
        """The API server that sent this. Raises NotNext for a message that does not count; where something is missing,
        what that API server has open is lost, and it is told so."""
        index = self._index.get(identity)
        if index is None:
            raise NotNext("the sender is no API server of this engine")
        session = self._sessions[index]
        try:
            if session is None or session.id != stamp.session:
                self._send(index, stamped(pack(Kind.RESET, Reset(self._latest[index])), stamp.session, 0))
                raise NotNext(f"API server {index} has not joined with session {stamp.session}")
            session.take(stamp, frames)
        except Gap:
            log.warning("messages of API server %d are missing: its %d choices end", index, len(self.live[index]))
            self._lose(index)
            self._send(index, stamped(pack(Kind.RESET, Reset(self._latest[index])), stamp.session, 0))
            raise
        return index

    def send(self, index: int, message: list[Any]) -> None:
        """An API server that is gone is remembered for ``take_lost``."""
        session = self._sessions[index]
        if session is not None and not self._send(index, session.stamped(message)):
            if self.live[index]:
                log.warning("API server %d is gone, its %d open choices are aborted", index, len(self.live[index]))
            self._lose(index)

    def _send(self, index: int, message: list[Any]) -> bool:
        """False if nobody is there."""
        try:
            self.socket.send_multipart([self._identities[index], *message], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def send_to_all(self, message: list[Any]) -> None:
        for index in range(len(self._sessions)):
            self.send(index, message)

    def _lose(self, index: int) -> None:
        if self._sessions[index] is not None:
            self._sessions[index] = None
            self._lost.add(index)

    def take_lost(self) -> list[int]:
        """The choice ids that nobody waits for any more."""
        if not self._lost:
            return []
        ids = [id for index in self._lost for id in self.live[index]]
        for index in self._lost:
            self.live[index].clear()
        self._lost.clear()
        return ids
