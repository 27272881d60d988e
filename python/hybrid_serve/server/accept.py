"""Accepting connections from a socket that several API servers share."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from ssl import SSLContext, SSLError

from .shared_counts import SharedCounts

log = logging.getLogger(__name__)
PATIENCE = 0.001  # seconds that a connection is left to those that have fewer; then anybody takes it
MOST_A_TURN = 16  # of the event loop: then those that are there come first
MOMENTS_BEHIND = 4  # that somebody waited through
RETRY = 0.1  # seconds, when there is no file left for a connection


class FairAcceptor:
    """Takes what waits, but leaves it for a moment to the others while it has more than the mean of all: otherwise
    whoever wakes first takes all. Whoever has fewer may be dead or busy, so the moment is short, and the longer
    somebody has been waiting there without a break, the more are taken after it.

    Knows numbers of connections; not what comes over them."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        shared: SharedCounts,
        num_open: Callable[[], int],
        ssl: SSLContext | None,
        handshake_seconds: float | None,
    ) -> None:
        """``num_open``: connections of this process. Listens from now on; call it inside the event loop."""
        self._listener, self._make_protocol, self._shared, self._num_open = listener, make_protocol, shared, num_open
        self._ssl, self._handshake_seconds = ssl, handshake_seconds
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._num_moments = 0  # that were left to others since nobody waited
        self._num_granted = 0  # connections that we may take although others have fewer
        self._is_closed = False
        self.is_behind = False  # more connections come than are taken
        listener.setblocking(False)
        shared.num_connections = num_open()  # not what an earlier process of our index left
        self._listen()

    def close(self) -> None:
        self._is_closed = True
        self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """As an ``asyncio.Server`` has it. Nobody is left between the socket and his protocol."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._someone_is_there)

    def _wait(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        if not self._is_closed:
            self._listen()
            self._someone_is_there()

    def _someone_is_there(self) -> None:
        for _ in range(MOST_A_TURN):
            if not self._take_one():
                return
        self.is_behind = True

    def _take_one(self) -> bool:
        """Whether to go on at once."""
        num_open = self._num_open() + len(self._opening)
        self._shared.num_connections = num_open
        if self._num_granted == 0 and num_open > self._shared.mean_connections:
            self._num_moments += 1
            self._num_granted = self._num_moments
            self.is_behind = self.is_behind or self._num_moments >= MOMENTS_BEHIND
            self._wait(PATIENCE)
            return False
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            self._num_granted = self._num_moments = 0
            self.is_behind = False
            return False  # nobody waits: another one took it, or the client went
        except OSError as error:
            log.error("no connection can be accepted: %s", error)
            self._wait(RETRY)
            return False
        self._num_granted = max(0, self._num_granted - 1)
        self._shared.num_connections = num_open + 1
        opening = self._loop.create_task(self._open(connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True

    async def _open(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            await self._loop.connect_accepted_socket(
                self._make_protocol, connection, ssl=self._ssl, ssl_handshake_timeout=self._handshake_seconds
            )
        except (OSError, SSLError) as error:  # it went, or does not speak TLS
            log.debug("connection lost before it began: %s", error)
            connection.close()
