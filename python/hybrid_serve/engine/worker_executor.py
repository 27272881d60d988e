"""WorkerExecutor: has the steps computed by a process of its own: loop and model share no interpreter."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from setproctitle import getproctitle
from typing_extensions import Buffer

from ..config import Config
from ..errors import StartupError
from .arenas import SharedArena
from .executor import ExecutorFacts, Layout, Report, StepResult
from .worker_wire import (
    BATCH_FIELDS,
    Allocate,
    Allocated,
    Answer,
    AskPreparation,
    Await,
    Bind,
    Channel,
    Failed,
    Loaded,
    Preparation,
    Prepare,
    Progress,
    ReceivedResult,
    Request,
    Result,
    Start,
    Submit,
)

if TYPE_CHECKING:
    from .._core import Batch

log = logging.getLogger(__name__)
_BOOT = "import sys; sys.path[:] = sys.argv[2].split(chr(10)); from hybrid_serve.engine.worker import main; main()"
_LOAD = "hybrid_serve.engine.executor:load_inline"
_A = TypeVar("_A")


class WorkerError(Exception):
    """The worker died or failed, and the engine, which cannot go on without it, fails with this cause."""


class WorkerPending(NamedTuple):
    executor: WorkerExecutor

    def result(self) -> StepResult:
        return ReceivedResult(self.executor.ask(Await(), Result))


class WorkerExecutor:
    """Passes on what the loop asks, in the same order, to the worker, which knows the model. Holds no model itself."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self._process, self._channel = process, channel
        self.depth = 1

    def load(self, start: Start, report: Report) -> None:
        """Raises StartupError."""
        self._tell(start)
        while isinstance(message := self._hear(), Progress):
            report(message.phase, message.share)
        self.depth = _expect(message, Loaded).depth

    def allocate(self) -> ExecutorFacts:
        return self.ask(Allocate(), Allocated).facts

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        """``arenas``: those of ``SharedArena``."""
        fds = [arena.fd for arena in arenas if isinstance(arena, SharedArena)]
        if len(fds) != len(arenas):
            raise TypeError("a worker can map shared arenas only")
        self._tell(Bind(len(fds), dict(layout)))
        self._channel.send_fds(fds)

    def submit(self, batch: Batch) -> WorkerPending:
        self._tell(Submit([getattr(batch, name) for name in BATCH_FIELDS]))
        return WorkerPending(self)

    def preparation(self) -> Callable[[], None] | None:
        if not self.ask(AskPreparation(), Preparation).exists:
            return None

        def prepare() -> None:
            self.ask(Prepare(), Preparation)

        return prepare

    def ask(self, request: Request, kind: type[_A]) -> _A:
        self._tell(request)
        return _expect(self._hear(), kind)

    def fail_when_it_dies(self) -> None:
        """From now on its death interrupts whatever the main thread does or waits for."""
        signal.signal(signal.SIGCHLD, self._child_ended)

    def _child_ended(self, *_: object) -> None:
        if self._process.poll() is not None:
            self._expect_its_end()
            raise self._death()

    def _expect_its_end(self) -> None:
        """It is no news any more, and must not interrupt the report of why."""
        if signal.getsignal(signal.SIGCHLD) == self._child_ended:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _tell(self, request: Request) -> None:
        try:
            self._channel.send(request)
        except OSError as error:
            raise self._death() from error

    def _hear(self) -> Answer:
        try:
            answer: Answer = self._channel.receive()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, Failed):
            self._expect_its_end()
            if answer.failure is not None:
                raise StartupError.of(answer.failure)
            raise WorkerError(f"the worker (pid {self._process.pid}) failed: {answer.text}")
        return answer

    def _death(self) -> WorkerError:
        code = self._process.wait()
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return WorkerError(f"the worker (pid {self._process.pid}) {how}")


def load_worker(config: Config, report: Report, load: str = _LOAD) -> WorkerExecutor:
    """Starts the worker, which finds and loads the model. ``load``: what it computes with, an ``executor.Load``.
    Raises StartupError."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(theirs.fileno()), "\n".join(sys.path)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
    executor = WorkerExecutor(process, Channel(ours, Answer))
    if threading.current_thread() is threading.main_thread():
        executor.fail_when_it_dies()
    name = f"worker of {getproctitle().removeprefix('hybrid-serve: ')}"
    executor.load(Start(config, load, name), report)
    log.info("the worker is pid %d", process.pid)
    return executor


def _expect(answer: Any, kind: type[_A]) -> _A:
    if not isinstance(answer, kind):
        raise WorkerError(f"the worker answered {type(answer).__name__}, not {kind.__name__}")
    return answer
