"""WatchedExecutor: says in the heartbeat which step is begun, for whoever has to find out what an engine died of, and
measures what passes between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import Buffer

from ..heartbeat import BatchHeader, EnginePhase, Heartbeat
from .executor import Executor, ExecutorFacts, Layout, Pending, StepResult
from .gaps import Gaps

if TYPE_CHECKING:
    from .._core import Batch, Scheduler


class WatchedPending(NamedTuple):
    pending: Pending
    gaps: Gaps

    def result(self) -> StepResult:
        value = self.pending.result()
        self.gaps.over()
        return value


class WatchedExecutor:
    """An executor in front of another one. Knows the batch's numbers and ids, not what is computed."""

    def __init__(self, executor: Executor, core: Scheduler, heartbeat: Heartbeat) -> None:
        self._executor, self._core, self._heartbeat = executor, core, heartbeat
        self.depth = executor.depth
        self.gaps = Gaps()

    def allocate(self) -> ExecutorFacts:
        return self._executor.allocate()

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        self._executor.bind(arenas, layout)

    def submit(self, batch: Batch) -> Pending:
        header = BatchHeader(*(getattr(batch, name) for name in BatchHeader._fields))
        self._heartbeat.enter_step(header, self._core.ids_in_flight())
        self.gaps.begun()
        return WatchedPending(self._executor.submit(batch), self.gaps)

    def preparation(self) -> Callable[[], None] | None:
        """Asked for whenever there is nothing else to do."""
        self.gaps.rested()
        work = self._executor.preparation()

        def watched() -> None:
            self._heartbeat.enter(EnginePhase.CAPTURE)
            if work is not None:
                work()

        return None if work is None else watched
