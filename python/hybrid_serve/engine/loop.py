"""The engine's loop: one rule for plain, overlapped and pipelined execution, which differ in their depth only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from .executor import Executor, Pending, StepResult
from .phases import COMMIT, MESSAGES, SCHEDULE, SUBMIT, WAIT, Phases

if TYPE_CHECKING:
    from .._core import Batch, Outputs, Scheduler


class Source(Protocol):
    """Where requests come from: the ``Inbox``, or in one process with its user, the ``LLM``."""

    @property
    def stopping(self) -> bool: ...

    def drain(self, core: Scheduler, wait: bool) -> None: ...


class Sink(Protocol):
    """Where outputs go."""

    def send(self, outputs: Outputs, result: StepResult) -> None: ...
    def send_stats(self, core: Scheduler, idle: bool) -> None: ...


class EngineLoop:
    """Messages in, steps, columns out; sleeps while there is nothing to do. Knows no model and no socket."""

    def __init__(
        self, core: Scheduler, executor: Executor, inbox: Source, outbox: Sink, phases: Phases | None = None
    ) -> None:
        self.core, self.executor, self.inbox, self.outbox = core, executor, inbox, outbox
        self.phases = phases or Phases()

    def run(self) -> None:
        """Until the supervisor says stop."""
        for _ in self.turns():
            pass

    def turns(self) -> Iterator[None]:
        """The same turn by turn, for whoever has time in his own hands."""
        core, inbox, outbox, depth = self.core, self.inbox, self.outbox, self.executor.depth
        phases, passed = self.phases, self.phases.passed
        in_flight: deque[tuple[Batch, Pending]] = deque()
        while not inbox.stopping:
            idle = not in_flight and core.idle
            outbox.send_stats(core, idle)
            preparation = self.executor.preparation() if idle else None
            inbox.drain(core, wait=idle and preparation is None)
            if preparation is not None and core.idle and not inbox.stopping:
                preparation()  # one piece: then whoever has come meanwhile is served
                yield
                continue
            if idle:
                phases.rested()
            else:
                passed(MESSAGES)
            while len(in_flight) < depth and (batch := core.schedule(time.monotonic_ns() // 1000)) is not None:
                passed(SCHEDULE)
                in_flight.append((batch, self.executor.submit(batch)))
                passed(SUBMIT)
            if in_flight:
                batch, pending = in_flight.popleft()
                result = pending.result()
                passed(WAIT)
                outputs = core.commit(batch.step, result.tokens)
                passed(COMMIT)
                outbox.send(outputs, result)
                phases.sent()
            elif not core.idle:
                raise RuntimeError("the scheduler has work, nothing is in flight, and it gives no batch")
            yield
