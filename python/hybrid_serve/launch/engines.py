"""One engine of this machine, as its supervisor sees it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ..config import Config
from ..heartbeat import Heartbeat, make, max_watched_ids
from ..wire import StartupFailure, Status
from . import evidence
from .local import Child
from .plan import ProcessSpec, stacks_path
from .watchdog import Verdict, Watchdog, stacks_of

log = logging.getLogger(__name__)


class WatchedEngine:
    """What it said of itself last, and what its heartbeat says. Ends nobody; knows no other engine."""

    def __init__(self, spec: ProcessSpec, config: Config) -> None:
        self.spec = spec
        self.heartbeat = Heartbeat(spec.arguments["heartbeat_fd"], max_watched_ids(config))
        self.watchdog = Watchdog(config.supervision, self.heartbeat)
        self.status = Status("starting", engine=spec.index)
        self._recordings = config.supervision.flight_recorder_dir
        self._is_quiet = False  # and API servers were told

    @property
    def is_ready(self) -> bool:
        return self.status.phase == "ready"

    def said(self, status: Status) -> Status:
        """The same with what the supervisor adds."""
        old = self.status
        self.status = msgspec.structs.replace(
            status, engine=self.spec.index, restarts=old.restarts, facts=status.facts or old.facts
        )
        return self.status

    def died(self, phase: str, message: str, restarts: int) -> Status:
        """With the requests that ran and that are to blame."""
        log.error("its last batch: %s", self.heartbeat.batch)
        self._is_quiet = False
        self.status = Status(
            phase,
            message=message,
            facts=self.status.facts,
            restarts=restarts,
            suspects=self.heartbeat.running,
            culprits=self.heartbeat.culprits,
            engine=self.spec.index,
        )
        return self.status

    def quiet(self, verdict: Verdict) -> Status | None:
        """What API servers must be told of its silence; None: nothing new."""
        if self._is_quiet == (verdict is Verdict.QUIET):
            return None
        self._is_quiet = not self._is_quiet
        status = msgspec.structs.replace(self.status, suspects=b"", culprits=b"")
        if self._is_quiet:
            status = msgspec.structs.replace(status, phase="not_responding", message=self.watchdog.reason)
        return status

    def keep_recording(self, why: str) -> str:
        """The path of the file; empty if there is nothing to keep."""
        return evidence.keep(self.heartbeat.recording, self._recordings, self.spec.index, why)

    def with_recording(self, cause: StartupFailure) -> StartupFailure:
        """Of its end, with where its last steps are."""
        path = self.keep_recording(cause.what)
        if not path:
            return cause
        return msgspec.structs.replace(cause, fix=f"{cause.fix}; hybrid-serve replay {path} runs its last steps")

    def why_hung(self, child: Child, directory: Path, exit_code: int) -> StartupFailure:
        """Logs where it hangs."""
        reason, what = self.watchdog.reason, f"{self.spec.name} (pid {child.process.pid}) hung"
        stacks = stacks_of(child.process.pid, stacks_path(directory, self.spec.index)) or "no stack could be had"
        log.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, f"{what}: {reason}", (), None, sinfo=stacks))
        fix = "the stacks above show where; if it was only slow, a longer limit"
        return StartupFailure("HS-E203", what, reason, fix, exit_code)


def keep_recordings(engines: Iterable[WatchedEngine]) -> None:
    for engine in engines:
        engine.keep_recording("asked for by signal")


def make_heartbeats(config: Config) -> list[int]:
    """File descriptors of memory for each engine of this machine, to be closed with ``close_all``."""
    return [make(max_watched_ids(config)) for _ in config.parallel.local_ranks]


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
