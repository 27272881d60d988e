"""SIGINT and SIGTERM for a loop that waits in a poll."""

from __future__ import annotations

import signal
import socket


class Signals:
    """SIGINT and SIGTERM as bytes on a socket, so that one poll waits for them and for everything else."""

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.readable, self._written = socket.socketpair()
        self.readable.setblocking(False)
        self._written.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in self.HANDLED}

    def take(self) -> list[int]:
        try:
            return [number for number in self.readable.recv(64) if number in self.HANDLED]
        except BlockingIOError:
            return []

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self.readable.close()
        self._written.close()
