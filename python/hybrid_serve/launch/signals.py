"""The supervisor's signals, for a loop that waits in a poll."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable


class Signals:
    """Signals as bytes on a socket, so that one poll waits for them and for everything else. SIGHUP that comes because
    the terminal went is given as SIGTERM; where the parent had it ignored (nohup) it stays ignored."""

    RECORD = signal.SIGUSR2  # keep a flight recording
    RELOAD = signal.SIGHUP
    HANDLED = (signal.SIGINT, signal.SIGTERM, RECORD, RELOAD)

    def __init__(self, record: Callable[[], None] = lambda: None) -> None:
        """``record``: what RECORD asks for; the others are given out by ``take``."""
        self._record = record
        self.readable, self._written = socket.socketpair()
        self.readable.setblocking(False)
        self._written.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._had_terminal = _has_terminal()
        wanted = [number for number in self.HANDLED if signal.getsignal(number) != signal.SIG_IGN]
        self._old = {number: signal.signal(number, lambda *_: None) for number in wanted}

    def take(self) -> list[int]:
        try:
            numbers = [self._meaning(number) for number in self.readable.recv(64) if number in self._old]
        except BlockingIOError:
            return []
        if self.RECORD in numbers:
            self._record()
        return [number for number in numbers if number != self.RECORD]

    def _meaning(self, number: int) -> int:
        is_hang_up = number == self.RELOAD and self._had_terminal and not _has_terminal()
        return signal.SIGTERM if is_hang_up else number

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self.readable.close()
        self._written.close()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
