"""Gaps: how long the device waited for the host between two steps, although there was work."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from ..wire import STEP_GAP_BOUNDS


class Gaps:
    """Counts by length, from the host's clock alone: nobody waits for the device to know. A step that is submitted
    while another is under way counts as no gap, which on a device that runs ahead is the least that it can have been.
    Knows no step."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._num_under_way = 0
        self._free_since = -1  # -1: there was no work since
        self.counts = [0] * (len(STEP_GAP_BOUNDS) + 1)
        self.total_us = 0.0

    def begun(self) -> None:
        """A step is submitted."""
        gap = 0.0
        if self._num_under_way == 0 and self._free_since >= 0:
            gap = (self._clock() - self._free_since) * 1e-3
        if self._num_under_way > 0 or self._free_since >= 0:
            self.counts[bisect_left(STEP_GAP_BOUNDS, gap)] += 1
            self.total_us += gap
        self._num_under_way += 1

    def over(self) -> None:
        """A step's results are there."""
        self._num_under_way -= 1
        self._free_since = self._clock()

    def rested(self) -> None:
        """There is no work: until the next step nobody waits for the host."""
        self._free_since = -1
