"""The worker process: an executor of its own, asked by the engine's ``WorkerExecutor``."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from setproctitle import setproctitle

from ..errors import StartupError, lack_of_memory
from ..logging import configure
from .arenas import SharedArena
from .executor import Executor, Pending
from .process import collect_garbage_rarely, die_with_parent
from .worker_wire import (
    Allocate,
    Allocated,
    AskPreparation,
    Await,
    Bind,
    Channel,
    Failed,
    Loaded,
    Preparation,
    Prepare,
    Progress,
    Request,
    Result,
    SentBatch,
    Start,
    Submit,
)

log = logging.getLogger(__name__)


def main() -> None:
    """``sys.argv[1]``: the file descriptor of the socket to the engine. Ends with the engine, never before."""
    die_with_parent()
    # The supervisor alone decides when the engine ends, also where a service manager signals every process at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), Request)
    channel.socket.set_inheritable(False)
    try:
        try:
            _work(channel)
        except StartupError as error:
            channel.send(Failed(str(error), error.failure))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            lack = lack_of_memory("the worker", error)
            if lack is None:
                log.exception("the worker failed")
            channel.send(Failed(f"{type(error).__name__}: {error}", lack.failure if lack else None))
        channel.receive()  # waits for the end of the engine, which has the cause to report
    except (EOFError, ConnectionError):
        os._exit(0)  # as a child does: nobody is left for whom to tidy up


def _work(channel: Channel) -> None:
    start: Start = channel.receive()
    server = start.config.server
    setproctitle(f"hybrid-serve: {start.name}")
    configure(server.log_level, start.name, server.secrets, form=server.log_format)
    module, _, function = start.load.partition(":")
    executor: Executor = getattr(import_module(module), function)(
        start.config, lambda phase, share: channel.send(Progress(phase, share))
    )
    channel.send(Loaded(executor.depth))
    Worker(channel, executor).run()


class Worker:
    """Does what it is told, one thing after the other. Knows the executor and no request."""

    def __init__(self, channel: Channel, executor: Executor) -> None:
        self._channel, self._executor = channel, executor
        self._under_way: deque[Pending] = deque()
        self._preparation: Callable[[], None] | None = None

    def run(self) -> NoReturn:
        """Until the channel ends, which raises."""
        while True:
            self.obey(self._channel.receive())

    def obey(self, request: Request) -> None:
        match request:
            case Submit(batch):
                self._under_way.append(self._executor.submit(SentBatch(*batch)))  # type: ignore[arg-type]
            case Await():
                self._channel.send(Result.of(self._under_way.popleft().result()))
            case AskPreparation():
                self._preparation = self._executor.preparation()
                self._channel.send(Preparation(self._preparation is not None))
            case Prepare() if self._preparation is not None:
                self._preparation()
                self._channel.send(Preparation(False))
            case Allocate():
                self._channel.send(Allocated(self._executor.allocate()))
            case Bind(num_arenas, layout):
                arenas = [SharedArena.of_file(fd) for fd in self._channel.receive_fds(num_arenas)]
                self._executor.bind(arenas, layout)
                collect_garbage_rarely()
            case _:
                raise ValueError(f"{request} makes no sense here")
