"""How often a process that dies is started again. Knows times, no process."""

from __future__ import annotations

from collections import deque

from ..config import SupervisionConfig

WINDOW = 300.0  # seconds in which restarts are counted
LONGEST_PAUSE = 30.0


class Restarts:
    """One process's restarts: so many in ``WINDOW``, the first at once, each further one after twice the pause."""

    def __init__(self, config: SupervisionConfig) -> None:
        self._limit, self._delay = config.max_restarts, config.restart_delay
        self._times: deque[float] = deque()
        self.total = 0

    def next_pause(self, now: float) -> float | None:
        """Seconds until it may start again, which counts as a restart; None: no more."""
        while self._times and self._times[0] <= now - WINDOW:
            self._times.popleft()
        if len(self._times) >= self._limit:
            return None
        pause = min(self._delay * 2 ** (len(self._times) - 1), LONGEST_PAUSE) if self._times else 0.0
        self._times.append(now + pause)
        self.total += 1
        return pause

    @property
    def recent(self) -> int:
        """Those that count when ``next_pause`` was asked last."""
        return len(self._times)
