"""An engine's part in lockstep: every step is begun with the other replicas, empty ones where this one has no work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from typing_extensions import Buffer

from ..parallel.lockstep import Lockstep
from .executor import Executor, ExecutorFacts, Layout, Pending
from .inbox import Inbox

if TYPE_CHECKING:
    from .._core import Batch, Scheduler


class SteppingExecutor(Executor, Protocol):
    """An executor of a model whose replicas must step together."""

    def submit_empty(self) -> Pending:
        """A step without a sequence, for the others' sake. Its result is nothing."""
        ...


class JointExecutor:
    """In front of another one: no step begins before all begin it. Knows no batch."""

    def __init__(self, executor: SteppingExecutor, lockstep: Lockstep) -> None:
        self._executor, self._lockstep = executor, lockstep
        self.depth = executor.depth

    def allocate(self) -> ExecutorFacts:
        return self._executor.allocate()

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        self._executor.bind(arenas, layout)

    def preparation(self) -> Callable[[], None] | None:
        return self._executor.preparation()

    def submit(self, batch: Batch) -> Pending:
        self._lockstep.begin()
        return self._executor.submit(batch)

    def join_in(self) -> None:
        """An empty step, if another replica has begun one."""
        if self._lockstep.is_called:
            self._lockstep.begin()
            self._executor.submit_empty().result()


class JointInbox:
    """In front of the inbox: whoever sleeps there is woken by the other replicas, too. A ``loop.Source``."""

    def __init__(self, inbox: Inbox, executor: JointExecutor, lockstep: Lockstep) -> None:
        self._inbox, self._executor = inbox, executor
        inbox.wake_by(lockstep.socket)

    @property
    def stopping(self) -> bool:
        return self._inbox.stopping

    def drain(self, core: Scheduler, wait: bool) -> None:
        self._inbox.drain(core, wait)
        if wait and core.idle:  # with work, or with steps in flight, it comes to its own next step
            self._executor.join_in()
