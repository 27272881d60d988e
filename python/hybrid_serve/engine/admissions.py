"""Admissions: how fast requests get a place while others wait for one."""

from __future__ import annotations

from collections import deque

MOST = 64  # of which the mean is taken


class Admissions:
    """The mean time from one admission to the next, over the last ones of requests that had to wait, and over that time
    only in which there was no room. Knows when and how many, no request."""

    def __init__(self) -> None:
        self._full_seconds = self._last = 0.0  # without room, in all; of the clock
        self._was_full = False
        self._at: deque[float] = deque([0.0], maxlen=MOST)  # in seconds without room

    def saw(self, now: float, num_admitted: int, is_full: bool) -> None:
        """Since the last call; ``is_full``: from now on a new request waits."""
        if self._was_full:
            self._full_seconds += now - self._last
            self._at.extend([self._full_seconds] * min(num_admitted, MOST))
        self._last, self._was_full = now, is_full

    @property
    def seconds_each(self) -> float:
        """0: not known yet, nobody ever waited until somebody was let in."""
        num_gaps, newest, oldest = len(self._at) - 1, self._at[-1], self._at[0]
        if newest == 0:
            return 0.0
        mean = (newest - oldest) / num_gaps if newest > oldest else 0.0
        return max(
            mean, (self._full_seconds - oldest) / (num_gaps + 1)
        )  # who waits now has waited long enough to count
