"""Supervisor: the parent of a server's processes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ..config import Config
from ..errors import StartupError
from ..sockets import bind_router, readable
from ..wire import (
    COUNTS_SLOT_BYTES,
    Empty,
    Hello,
    Kind,
    StartupFailure,
    Status,
    api_identity,
    engine_identity,
    pack,
    unpack,
)
from . import listener
from .handshake import refusal
from .local import Child, start
from .plan import ProcessSpec, control_address, plan
from .report import PlainReporter, Reporter
from .run_directory import RunDirectory

log = logging.getLogger(__name__)

ENGINE_FAILED = 20
LAST_WORDS = 0.3  # seconds a dead child's report may still be on its way
GRACE = 2.0  # seconds beyond the time a child was given to end by itself
DRAIN_GRACE = 5.0  # the same for a drain, whose last streams are cut and then still say so


class Phase(Enum):
    STARTING = 1
    SERVING = 2
    DRAINING = 3  # API servers finish what runs
    STOPPING = 4  # everything ends now


def serve(config: Config, reporter: Reporter | None = None, **plan_options: Any) -> int:
    """Runs a server until it is told to stop: 0 after a drained stop, 130 or 143 after a forced one.

    Raises StartupError, with nothing left running, if it cannot start (its own exit code) or dies (exit code 20).
    ``plan_options``: see ``plan``.
    """
    reporter = reporter or PlainReporter(config)
    num_api_servers = plan_options.get("num_api_servers", 1)
    with (
        listener.listen(config.server) as http,
        RunDirectory() as directory,
        shared_counts(num_api_servers) as counts,
    ):
        reporter.bound(listener.url(http, "https" if config.server.ssl_certfile else "http"))
        specs = plan(config, directory, http.fileno(), counts_fd=counts, **plan_options)
        supervisor = Supervisor(config, directory, specs, reporter)
        try:
            return supervisor.run()
        finally:
            supervisor.close()


@contextmanager
def shared_counts(num_api_servers: int) -> Iterator[int]:
    """File descriptor of memory where API servers keep their counts; they come and go, it stays."""
    fd = os.memfd_create("hybrid-serve-counts")
    try:
        os.ftruncate(fd, num_api_servers * COUNTS_SLOT_BYTES)
        yield fd
    finally:
        os.close(fd)


class Supervisor:
    """Starts the planned processes, passes on what the engine says of itself, and ends all of them when one of them
    ends, or in order when a signal asks for it. Knows no request. Never outlived by a child."""

    def __init__(self, config: Config, directory: Path, specs: list[ProcessSpec], reporter: Reporter) -> None:
        self.config, self.directory, self.specs, self.reporter = config, directory, specs, reporter
        self.phase = Phase.STARTING
        self.failure: StartupFailure | None = None  # the first one: the others follow from it
        self.exit_code = 0
        self.children: dict[int, Child] = {}  # by file descriptor of its life
        self._engine_status = Status("starting")
        self._greeted: set[bytes] = set()
        self._digest = config.digest()
        self._deadline: float | None = None
        self._context = zmq.Context()
        self._control = bind_router(self._context, control_address(directory))
        self._poller = zmq.Poller()
        self._poller.register(self._control, zmq.POLLIN)
        self._signals = Signals()
        self._poller.register(self._signals.readable, zmq.POLLIN)

    def run(self) -> int:
        """Returns the exit code when no child is left. Raises StartupError if that was not wanted."""
        for spec in self.specs:
            child = start(spec, self.config, str(self.directory))
            self.children[child.life.fileno()] = child
            self._poller.register(child.life, zmq.POLLIN)
        while self.children:
            events = dict(self._poller.poll(self._milliseconds_left()))
            self._take_messages()
            for number in self._signals.take():
                self._signalled(number)
            for fd in [fd for fd in events if fd in self.children]:
                self._ended(self.children.pop(fd))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._deadline = None
                self.phase = Phase.STOPPING
                self._kill_all()
        if self.failure is not None:
            failure = self.failure
            raise StartupError(failure.code, failure.what, failure.why, failure.fix, self.exit_code)
        return self.exit_code

    def close(self) -> None:
        """Whatever happened: no child is left behind, no handler, no socket."""
        self._kill_all()
        for child in self.children.values():
            child.process.wait()
            child.life.close()
        self.children.clear()
        self._signals.close()
        self._context.destroy(linger=0)

    # What children say

    def _take_messages(self) -> None:
        while readable(self._control):
            frames = self._control.recv_multipart()
            try:
                identity, kind, header = frames
                self._take(identity, kind, header)
            except (ValueError, msgspec.DecodeError) as error:  # not three frames, or not ours
                log.warning("control message of %d frames dropped: %s", len(frames), error)

    def _take(self, identity: bytes, kind: bytes, header: bytes) -> None:
        if kind == Kind.FAILED:
            self._fail(unpack(header, StartupFailure))
        elif kind == Kind.HELLO:
            self._greet(identity, unpack(header, Hello))
        elif kind == Kind.STATUS and identity in self._greeted:
            self._engine_status = unpack(header, Status)
            self.reporter.status(self._engine_status)
            self._tell("api", pack(Kind.STATUS, self._engine_status))
            self._check_ready()
        else:
            log.warning("control message of kind %r from %r dropped", kind, identity)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        failure = refusal(hello, identity, self.specs, self._digest)
        if failure is not None:
            self._fail(failure)
            return
        log.debug("%s %d says hello, pid %d", hello.role, hello.index, hello.pid)
        self._greeted.add(identity)
        if hello.role == "api":
            self._send(identity, pack(Kind.STATUS, self._engine_status))
        self._check_ready()

    def _check_ready(self) -> None:
        everyone = {_identity(spec) for spec in self.specs}
        if self.phase is Phase.STARTING and self._engine_status.phase == "ready" and self._greeted == everyone:
            self.phase = Phase.SERVING
            self.reporter.ready()

    def _tell(self, role: str, message: list[Any]) -> None:
        for child in self._running(role):
            self._send(_identity(child.spec), message)

    def _send(self, identity: bytes, message: list[Any]) -> None:
        if identity not in self._greeted:
            return  # it learns the state when it says hello
        try:
            self._control.send_multipart([identity, *message], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            log.debug("%r is gone", identity)  # its end is handled where its life ends

    # What ends

    def _signalled(self, number: int) -> None:
        if self.phase is Phase.SERVING:
            self.phase = Phase.DRAINING
            self.reporter.draining(self.config.server.shutdown_timeout)
            self._tell("api", pack(Kind.SHUTDOWN, Empty()))
            self._end_in(self.config.server.shutdown_timeout + DRAIN_GRACE)
        elif self.phase in (Phase.STARTING, Phase.DRAINING):
            was_serving = self.phase is Phase.DRAINING
            self.phase = Phase.STOPPING
            self.exit_code = 128 + number
            if was_serving:  # open streams still get their error events
                self._tell("api", pack(Kind.SHUTDOWN, Empty()))
            self._end_in(GRACE / 2 if was_serving else 0)
        else:
            self._kill_all()

    def _ended(self, child: Child) -> None:
        self._poller.unregister(child.life)
        code = child.reap()
        log.debug("%s ended with exit code %d", child.spec.name, code)
        if self.phase is Phase.DRAINING and child.spec.role == "api" and code == 0:
            if not self._running("api"):  # nobody is left to serve: the engines can go
                self.phase = Phase.STOPPING
                self._tell("engine", pack(Kind.SHUTDOWN, Empty()))
                self._end_in(GRACE)
        elif self.phase is not Phase.STOPPING:
            self._wait_for(lambda: self.failure is not None, LAST_WORDS if code > 0 else 0)
            self._fail(_death(child, code))

    def _fail(self, failure: StartupFailure) -> None:
        """Ends the server. Only the first failure is reported: the others are its consequences."""
        if self.failure is not None or self.phase is Phase.STOPPING:
            return
        was_serving = self.phase in (Phase.SERVING, Phase.DRAINING)
        self.failure = failure
        self.exit_code = ENGINE_FAILED if was_serving else failure.exit_code
        self.phase = Phase.STOPPING
        if was_serving:
            log.error("%s: %s", failure.what, failure.why)
        self._tell("api", pack(Kind.STATUS, Status("dead", message=failure.what)))
        self._tell("api", pack(Kind.SHUTDOWN, Empty()))
        self._tell("engine", pack(Kind.SHUTDOWN, Empty()))
        self._end_in(GRACE if was_serving else 0)

    def _end_in(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def _milliseconds_left(self) -> int | None:
        if self._deadline is None:
            return None
        return max(0, int((self._deadline - time.monotonic()) * 1000) + 1)

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and (left := end - time.monotonic()) > 0:
            self._control.poll(int(left * 1000) + 1)
            self._take_messages()

    def _kill_all(self) -> None:
        for child in self.children.values():
            child.kill()

    def _running(self, role: str) -> list[Child]:
        return [child for child in self.children.values() if child.spec.role == role]


class Signals:
    """SIGINT and SIGTERM as bytes on a socket, so that one poll waits for them and for everything else."""

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.readable, self._written = socket.socketpair()
        self.readable.setblocking(False)
        self._written.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in self.HANDLED}

    def take(self) -> list[int]:
        try:
            return [number for number in self.readable.recv(64) if number in self.HANDLED]
        except BlockingIOError:
            return []

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self.readable.close()
        self._written.close()


def _identity(spec: ProcessSpec) -> bytes:
    return (engine_identity if spec.role == "engine" else api_identity)(spec.index)


def _death(child: Child, code: int) -> StartupFailure:
    """What to say of a child that ended without a word."""
    what = f"{child.spec.name} (pid {child.process.pid}) died"
    if code >= 0:
        why, fix = f"it ended with exit code {code}, although nobody asked it to", "look at the log above"
    else:
        name = signal.Signals(-code).name
        why, fix = f"it was killed by {name}", "the log above may have its stack"
        if -code == signal.SIGKILL:
            why += ", by somebody, or by the system for lack of memory"
            fix = "if it was memory: a smaller --kv-cache-memory-bytes or --max-num-seqs"
    return StartupFailure("HS-E202", what, why, fix, ENGINE_FAILED)
