"""Phases: what the engine's loop does with its time."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..wire import STEP_PHASES

MESSAGES, SCHEDULE, SUBMIT, WAIT, COMMIT, SEND = range(len(STEP_PHASES))


class Phases:
    """Nanoseconds by phase, while there is work: each moment between two marks belongs to the phase that the second
    one ends. Knows no step and no device: what runs there while the host schedules is nobody's."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._since = self._sent = clock()
        self.totals = [0] * len(STEP_PHASES)

    def rested(self) -> None:
        """What was before this was no work."""
        self._since = self._clock()

    def passed(self, phase: int) -> None:
        """This phase ends, and the next begins."""
        now = self._clock()
        self.totals[phase] += now - self._since
        self._since = now

    def sent(self) -> None:
        """A step's last phase ends."""
        self.passed(SEND)
        self._sent = self._since

    @property
    def step_age(self) -> float:
        """Seconds since a step was over; since the beginning, if none was."""
        return (self._clock() - self._sent) * 1e-9
