"""Dealers: sockets whose messages an event loop takes as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from ..curve import Keys
from ..sockets import connect_dealer, readable

log = logging.getLogger(__name__)
MESSAGES_A_TURN = 64  # then other tasks of the event loop get theirs
Take = Callable[[list[bytes]], None]


class Dealers:
    """One API server's DEALERs, all under its identity. Knows no kind of message: each socket has a ``take``, which may
    raise ValueError for what is none. No task, no thread, no lock."""

    def __init__(self, identity: bytes, keys: Keys | None = None) -> None:
        """``keys``: for addresses of other machines."""
        self._identity, self._keys = identity, keys
        self._takers: dict[zmq.Socket[bytes], Take] = {}

    def start(self) -> None:
        """Call it inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()

    def open(self, address: str, take: Take) -> zmq.Socket[bytes]:
        """The other end may still be to come."""
        keys = self._keys if address.startswith("tcp:") else None
        socket = connect_dealer(self._context, address, self._identity, keys)
        self._takers[socket] = take
        self._loop.add_reader(socket, self._receive, socket)
        self._loop.call_soon(self._receive, socket)
        return socket

    def send(self, socket: zmq.Socket[bytes], message: list[Any]) -> None:
        socket.send_multipart(message, flags=zmq.NOBLOCK)
        if readable(socket):  # the send may have swallowed the event that the loop waits for
            self._loop.call_soon(self._receive, socket)

    def drop(self, socket: zmq.Socket[bytes]) -> None:
        """Takes what has arrived; what has not goes with the socket."""
        self._loop.remove_reader(socket)
        take = self._takers.pop(socket)
        while readable(socket):
            self._receive_one(socket, take)
        socket.close(linger=0)

    def close(self) -> None:
        for socket in self._takers:
            self._loop.remove_reader(socket)
        self._context.destroy(linger=200)  # what was sent a moment ago still goes out
        self._takers.clear()

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        take = self._takers.get(socket)
        if take is None:
            return  # closed meanwhile
        for _ in range(MESSAGES_A_TURN):
            if not readable(socket):
                return
            self._receive_one(socket, take)
            if socket not in self._takers:
                return
        self._loop.call_soon(self._receive, socket)

    def _receive_one(self, socket: zmq.Socket[bytes], take: Take) -> None:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        try:
            take(frames)
        except (ValueError, IndexError, TypeError, msgspec.DecodeError) as error:
            log.error("message of %d frames dropped: %s", len(frames), error)
