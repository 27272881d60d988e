"""Watchdog: whether an engine that lives also works. Knows its heartbeat and the limits; ends nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from ..config import SupervisionConfig
from ..heartbeat import STACKS_SIGNAL, EnginePhase, Heartbeat

SECONDS_PER_TOKEN = 0.1  # of a step, on top of its limit: a long prompt on a slow machine is busy, not hung
STACKS_SECONDS = 0.5  # how long the stacks may take to be written


_WHAT = {EnginePhase.STEP: "step", EnginePhase.IDLE: "wait for requests", EnginePhase.CAPTURE: "capture of a graph"}


class Verdict(Enum):
    FINE = 1
    QUIET = 2  # no sign of life for half the time it has
    HUNG = 3


class Watchdog:
    """Two signs are looked at: the pulse, which says that the process is scheduled at all, with a short limit; and the
    phase, where a step has a long limit that grows with its tokens. While the model loads nothing is."""

    def __init__(
        self, config: SupervisionConfig, heartbeat: Heartbeat, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pulse_limit, self._step_limit = config.engine_heartbeat_timeout, config.engine_iteration_timeout
        self._heartbeat, self._clock = heartbeat, clock
        self.interval = min(1.0, self._pulse_limit / 8)  # seconds between two looks
        self._last_look = self._awake_since = clock()
        self.reason = ""

    def look(self) -> Verdict:
        """``reason`` says why it is not FINE."""
        now = self._clock()
        if now - self._last_look > self._pulse_limit / 2:  # we ourselves were stopped, and the engine perhaps with us
            self._awake_since = now
        self._last_look = now
        awake, heartbeat = now - self._awake_since, self._heartbeat
        if heartbeat.phase is EnginePhase.LOADING:
            return Verdict.FINE
        silence = min(heartbeat.pulse_age(), awake)
        if silence > self._pulse_limit / 2:
            self.reason = f"no sign of life for {silence:.1f} s, --engine-heartbeat-timeout is {self._pulse_limit:g} s"
            return Verdict.HUNG if silence > self._pulse_limit else Verdict.QUIET
        batch = heartbeat.batch
        limit = self._step_limit + SECONDS_PER_TOKEN * batch.num_tokens
        busy = min(heartbeat.age(), awake)
        if busy > limit:
            what = _WHAT[heartbeat.phase]
            self.reason = f"its {what} has taken {busy:.1f} s, the limit for {batch.num_tokens} tokens is {limit:.1f} s"
            return Verdict.HUNG
        return Verdict.FINE


def stacks_of(pid: int, path: Path) -> str:
    """Python's stacks of an engine, one that is stopped included; what it managed to write."""
    path.write_text("")
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, STACKS_SIGNAL)
        os.kill(pid, signal.SIGCONT)  # a stopped process takes no signal
    end, text = time.monotonic() + STACKS_SECONDS, ""
    while time.monotonic() < end:
        time.sleep(0.05)
        before, text = text, path.read_text(errors="replace")
        if text and text == before:
            break
    return text
