"""The supervisor's signals, for a loop that waits in a poll."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable


class Signals:
    """Signals as bytes on a socket, so that one poll waits for them and for everything else."""

    RECORD = signal.SIGUSR2  # keep a flight recording
    HANDLED = (signal.SIGINT, signal.SIGTERM, RECORD)

    def __init__(self, record: Callable[[], None] = lambda: None) -> None:
        """``record``: what RECORD asks for; the others are given out by ``take``."""
        self._record = record
        self.readable, self._written = socket.socketpair()
        self.readable.setblocking(False)
        self._written.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in self.HANDLED}

    def take(self) -> list[int]:
        try:
            numbers = [number for number in self.readable.recv(64) if number in self.HANDLED]
        except BlockingIOError:
            return []
        if self.RECORD in numbers:
            self._record()
        return [number for number in numbers if number != self.RECORD]

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self.readable.close()
        self._written.close()
