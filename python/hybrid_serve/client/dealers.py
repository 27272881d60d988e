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
        self._monitors: dict[zmq.Socket[bytes], zmq.Socket[bytes]] = {}

    def start(self) -> None:
        """Call it inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._is_closed = False

    def every(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls it again and again, until ``close``."""

        def again() -> None:
            if not self._is_closed:
                call()
                self._loop.call_later(seconds, again)

        self._loop.call_later(seconds, again)

    def open(self, address: str, take: Take, on_break: Callable[[], None] | None = None) -> zmq.Socket[bytes]:
        """The other end may still be to come. ``on_break``: called when a connection over a network ended: it would be
        made again in silence, without what was on its way."""
        is_network = address.startswith("tcp:")
        socket = connect_dealer(self._context, address, self._identity, self._keys if is_network else None)
        if is_network and on_break is not None:
            self._watch(socket, on_break)
        self._read(socket, take)
        return socket

    def send(self, socket: zmq.Socket[bytes], message: list[Any]) -> None:
        socket.send_multipart(message, flags=zmq.NOBLOCK)
        if readable(socket):  # the send may have swallowed the event that the loop waits for
            self._loop.call_soon(self._receive, socket)

    def _watch(self, socket: zmq.Socket[bytes], on_break: Callable[[], None]) -> None:
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

        def event(frames: list[bytes]) -> None:
            if socket in self._takers:
                on_break()

        self._monitors[socket] = monitor
        self._read(monitor, event)

    def _read(self, socket: zmq.Socket[bytes], take: Take) -> None:
        self._takers[socket] = take
        self._loop.add_reader(socket, self._receive, socket)
        self._loop.call_soon(self._receive, socket)  # until it was asked once, a socket signals nothing

    def drop(self, socket: zmq.Socket[bytes]) -> None:
        """Takes what has arrived; what has not goes with the socket."""
        if (monitor := self._monitors.pop(socket, None)) is not None:
            self._loop.remove_reader(monitor)
            del self._takers[monitor]
            socket.disable_monitor()
            monitor.close()
        self._loop.remove_reader(socket)
        take = self._takers.pop(socket)
        while readable(socket):
            self._receive_one(socket, take)
        socket.close(linger=0)

    def close(self) -> None:
        self._is_closed = True
        for socket in self._takers:
            self._loop.remove_reader(socket)
        self._context.destroy(linger=200)  # what was sent a moment ago still goes out
        self._takers.clear()
        self._monitors.clear()

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
