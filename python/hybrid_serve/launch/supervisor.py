"""Supervisor: the parent of a server's processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ..config import Config
from ..errors import StartupError
from ..live import LiveOptions
from ..shared_memory import SharedMemory, shared
from ..sockets import bind_router, readable
from ..wire import ALL_ENGINES, LAST_WORDS_OF, Empty, Hello, Kind, StartupFailure, Status, pack, unpack
from . import listener, ray
from .engines import WatchedEngine, close_all, keep_recordings, make_heartbeats
from .handshake import device_refusal, refusal
from .local import Child, death, start
from .nodes import Neighbours, Nodes
from .plan import Front, ProcessSpec, again, control_address, plan
from .reload import Reload
from .report import PlainReporter, Reporter
from .restarts import WINDOW, Restarts
from .run_directory import RunDirectory
from .signals import Signals
from .watchdog import Verdict

log = logging.getLogger(__name__)

ENGINE_FAILED = 20
LAST_WORDS = 0.3  # seconds a dead child's report may still be on its way
LOOK_SECONDS = 1.0  # at most, between two looks at engines and other machines
GRACE = 2.0  # seconds beyond the time a child was given to end by itself
SETTLED = ("ready", "unloaded", "failed")  # phases of engines that a start does not wait for
DRAIN_GRACE = 5.0  # the same for a drain, whose last streams are cut and then still say so


class Phase(Enum):
    STARTING = 1
    SERVING = 2
    DRAINING = 3  # API servers finish what runs
    STOPPING = 4  # everything ends now


def serve(
    config: Config, reporter: Reporter | None = None, read: Callable[[], Config] | None = None, **plan_options: Any
) -> int:
    """Runs a server until it is told to stop: 0 after a drained stop, 130 or 143 after a forced one.

    Raises StartupError, with nothing left running, if it cannot start (its own exit code) or dies (exit code 20).
    ``read``: the configuration again, for SIGHUP; raises ValueError. ``plan_options``: see ``plan``.
    """
    reporter = reporter or PlainReporter(config)
    with (
        listener.listen(config.server) as http,
        RunDirectory() as directory,
        shared(config.server.api_server_count) as shared_fd,
    ):
        reporter.bound(listener.url(http, "https" if config.server.ssl_certfile else "http"))
        if config.parallel.is_ray:
            config = ray.prepared(config, directory)
        heartbeat_fds = make_heartbeats(config)
        nodes = Nodes(config) if config.parallel.remote_ranks else Neighbours()
        specs = plan(config, directory, Front(http.fileno(), shared_fd), heartbeat_fds, **plan_options)
        supervisor = Supervisor(config, directory, specs, reporter, nodes)
        supervisor.reload = Reload(config, read, LiveOptions(SharedMemory(shared_fd, config.server.api_server_count)))
        try:
            return supervisor.run()
        finally:
            supervisor.close()
            close_all(heartbeat_fds)
            nodes.close()


class Supervisor:
    """Starts the planned processes, passes on what engines say of themselves, starts again what dies or hangs; leaves
    out an engine with which that happens too often, ends all when nothing is left that could serve, or in order when a
    signal asks for it. Knows no request. Never outlived by a child."""

    def __init__(
        self, config: Config, directory: Path, specs: list[ProcessSpec], reporter: Reporter, neighbours: Neighbours
    ) -> None:
        """``neighbours``: those who start other engines of this server, or the one that these engines are for."""
        self.config, self.directory, self.specs, self.reporter = config, directory, specs, reporter
        self._neighbours = neighbours
        self.reload: Callable[[], None] | None = None  # SIGHUP while it serves
        self.phase = Phase.STARTING
        self.failure: StartupFailure | None = None  # the first one: the others follow from it
        self.exit_code = 0
        self.children: dict[int, Child] = {}  # by file descriptor of its life
        self.engines = {spec.identity: WatchedEngine(spec, config) for spec in specs if spec.role == "engine"}
        self._next_look = 0.0
        self._restarts = {spec.name: Restarts(config.supervision) for spec in specs}
        self._due: list[tuple[float, ProcessSpec]] = []  # to be started again, and when
        self._last_words: dict[bytes, StartupFailure] = {}  # of a child that is about to end
        self._greeted: set[bytes] = set()
        self._loading = {spec.identity for spec in specs if spec.role == "api"}  # those that take no requests yet
        self._digest = config.digest()
        self._deadline: float | None = None
        self._context = zmq.Context()
        self._control = bind_router(self._context, control_address(directory))
        self._poller = zmq.Poller()
        self._poller.register(self._control, zmq.POLLIN)
        self._signals = Signals(self._record)
        self._poller.register(self._signals.readable, zmq.POLLIN)
        neighbours.on_status, neighbours.on_end = self._take_news, self._told_to_end
        neighbours.on_news = lambda message: self._tell("api", message)
        neighbours.register(self._poller)

    def run(self) -> int:
        """Returns the exit code when no child is left. Raises StartupError if that was not wanted."""
        for spec in self.specs:
            self._start(spec)
        while self.children or self._due:
            events = dict(self._poller.poll(self._milliseconds_left()))
            self._take_messages()
            self._neighbours.take_messages()
            for number in self._signals.take():
                self._signalled(number)
            for fd in [fd for fd in events if fd in self.children]:
                self._ended(self.children.pop(fd))
            self._start_due()
            self._watch_engines()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._deadline = None
                self._stop()
                self._kill_all()
        if self.failure is not None:
            raise StartupError.of(self.failure, self.exit_code)
        return self.exit_code

    def _start(self, spec: ProcessSpec) -> None:
        if spec.role == "engine":
            self.engines[spec.identity].heartbeat.clear()
        child = start(spec, self.config, str(self.directory))
        self.children[child.life.fileno()] = child
        self._poller.register(child.life, zmq.POLLIN)

    def _start_due(self) -> None:
        now = time.monotonic()
        for due in [due for due in self._due if due[0] <= now]:
            self._due.remove(due)
            self._start(due[1])

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
            failure = unpack(header, StartupFailure)
            if self.phase is Phase.STARTING:
                self._fail(failure)
            if identity.startswith(LAST_WORDS_OF):  # else of an engine elsewhere, whose starter lives on
                self._last_words[identity.removeprefix(LAST_WORDS_OF)] = failure
        elif kind == Kind.HELLO:
            self._greet(identity, unpack(header, Hello))
        elif kind == Kind.READY and identity in self._greeted:
            self._loading.discard(identity)
            self._check_ready()
        elif kind == Kind.STATUS and identity in self._greeted and identity in self.engines:
            self._take_status(self.engines[identity], unpack(header, Status))
        elif kind == Kind.STATUS and identity in self._greeted:
            self._neighbours.given_up(unpack(header, Status))
        elif kind in (Kind.USE, Kind.ORDER) and identity in self._greeted:
            self._neighbours.take(identity, kind, header)
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
            for status in self._statuses():
                self._send(identity, pack(Kind.STATUS, status))
            for message in self._neighbours.greet(identity):
                self._send(identity, message)
            if self.phase is Phase.DRAINING:  # it was started before, and could not be told
                self._send(identity, pack(Kind.SHUTDOWN, Empty()))
        self._check_ready()

    def _take_status(self, engine: WatchedEngine, status: Status) -> None:
        status = engine.said(status)
        self._publish(status)
        if self.phase is Phase.STARTING:
            self.reporter.status(status)
            if (failure := device_refusal([engine.status.facts for engine in self.engines.values()])) is not None:
                self._fail(failure)
            self._check_ready()
        elif status.phase == "ready":
            log.info("%s serves again, restart %d", engine.spec.name, status.restarts)

    def _take_news(self, status: Status) -> None:
        """Of an engine on another machine."""
        self._tell("api", pack(Kind.STATUS, status))
        if self.phase is Phase.STARTING and not self.engines:
            self.reporter.status(status)
        self._check_ready()

    def _statuses(self) -> list[Status]:
        """Of all engines, wherever they are."""
        return [*(engine.status for engine in self.engines.values()), *self._neighbours.statuses]

    def _publish(self, status: Status) -> None:
        """News of an engine of this machine."""
        self._tell("api", pack(Kind.STATUS, status))
        self._neighbours.publish(status)

    def _check_ready(self) -> None:
        is_ready = not self._loading and all(status.phase in SETTLED for status in self._statuses())
        if self.phase is Phase.STARTING and is_ready:
            self.phase = Phase.SERVING
            self.reporter.ready()

    def _tell(self, role: str, message: list[Any]) -> None:
        for child in self._running(role):
            self._send(child.spec.identity, message)

    def _send(self, identity: bytes, message: list[Any]) -> None:
        if identity not in self._greeted:
            return  # it learns the state when it says hello
        try:
            self._control.send_multipart([identity, *message], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            log.debug("%r is gone", identity)  # its end is handled where its life ends

    # What ends, and starts again

    def _record(self) -> None:
        keep_recordings(self.engines.values())
        self._neighbours.record()

    def _signalled(self, number: int) -> None:
        if number == Signals.RELOAD:
            if self.phase is Phase.SERVING and self.reload is not None:
                self.reload()
        elif self.phase is Phase.SERVING:
            self.phase = Phase.DRAINING
            self.reporter.draining(self.config.server.shutdown_timeout)
            self._tell("api", pack(Kind.SHUTDOWN, Empty()))
            self._end_in(self.config.server.shutdown_timeout + DRAIN_GRACE)
            # An engine that is being restarted still has streams to finish; a new API server would have none.
            self._due = [due for due in self._due if due[1].role != "api"]
            self._stop_when_drained()
        elif self.phase in (Phase.STARTING, Phase.DRAINING):
            was_serving = self.phase is Phase.DRAINING
            self._stop()
            self.exit_code = 128 + number
            if was_serving:  # open streams still get their error events
                self._tell("api", pack(Kind.SHUTDOWN, Empty()))
            self._end_in(GRACE / 2 if was_serving else 0)
        else:
            self._kill_all()

    def _ended(self, child: Child) -> None:
        self._poller.unregister(child.life)
        code, identity = child.reap(), child.spec.identity
        self._greeted.discard(identity)
        log.debug("%s ended with exit code %d", child.spec.name, code)
        if self.phase is Phase.STOPPING:
            return
        drained = self.phase is Phase.DRAINING and child.spec.role == "api"
        if not (drained and code == 0):
            self._wait_for(lambda: identity in self._last_words, LAST_WORDS if code > 0 else 0)
            engine = self.engines.get(identity)
            facts = engine.status.facts if engine else None
            cause = self._last_words.pop(identity, None) or death(child, code, ENGINE_FAILED, facts)
            cause = engine.with_recording(cause) if engine else cause
            if self.phase is Phase.STARTING:
                self._fail(cause)
            elif drained:  # its streams are lost, the others' go on
                log.error("%s: %s", cause.what, cause.why)
                self.failure, self.exit_code = self.failure or cause, ENGINE_FAILED
            else:
                if child.spec.is_in_lockstep:
                    self._end_partners(cause)
                self._restart(child.spec, cause)
        self._stop_when_drained()

    def _end_partners(self, cause: StartupFailure) -> None:
        """Engines in lockstep begin anew together."""
        for partner in self._running("engine"):
            if partner.spec.identity in self._greeted:  # else it was started again, and waits for the others
                what = f"{partner.spec.name} was ended: {cause.what}"
                self._last_words.setdefault(partner.spec.identity, msgspec.structs.replace(cause, what=what))
                self._greeted.discard(partner.spec.identity)
                partner.kill()

    def _restart(self, spec: ProcessSpec, cause: StartupFailure) -> None:
        now, restarts = time.monotonic(), self._restarts[spec.name]
        pause, engine = restarts.next_pause(now), self.engines.get(spec.identity)
        if pause is None:
            often = f", after {restarts.recent} restarts within {WINDOW:g} s" if restarts.recent else ""
            cause = msgspec.structs.replace(cause, what=cause.what + often)
            others = [status for status in self._statuses() if status.engine != spec.index]
            if engine is None or all(status.phase in ("dead", "away") for status in others):
                self._fail(cause)
                return
            log.error("%s: %s; it is left out, the other engines go on", cause.what, cause.why)
            self._publish(engine.died("dead", cause.what, restarts.total))
            return
        when = f"in {pause:g} s" if pause else "now"
        log.error("%s: %s; it is started again %s; fix: %s", cause.what, cause.why, when, cause.fix)
        self._due.append((now + pause, again(spec)))
        if engine is not None:
            self._publish(engine.died("restarting", cause.what, restarts.total))

    def _watch_engines(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        if self.phase is not Phase.STOPPING:
            self._neighbours.look()
        running = {child.spec.identity: child for child in self._running("engine")}
        for identity, engine in self.engines.items():
            self._next_look = min(self._next_look, now + engine.watchdog.interval)
            verdict = engine.watchdog.look()
            is_ending = identity not in running or identity in self._last_words
            if self.phase not in (Phase.SERVING, Phase.DRAINING) or is_ending:
                continue
            if verdict is Verdict.HUNG:  # its end is handled like any other, with the reason as its last words
                child = running[identity]
                self._last_words[identity] = engine.why_hung(child, self.directory, ENGINE_FAILED)
                child.kill()
            elif (status := engine.quiet(verdict)) is not None:
                self._publish(status)

    def _told_to_end(self, failure: StartupFailure | None) -> None:
        """By the head that these engines are for."""
        if failure is not None:
            self._fail(failure)
        elif self.phase is not Phase.STOPPING:
            self._end_engines()

    def _stop(self) -> None:
        self.phase = Phase.STOPPING
        self._due.clear()
        self._tell("ray", pack(Kind.SHUTDOWN, Empty()))
        self._neighbours.leave()

    def _stop_when_drained(self) -> None:
        """Nobody is left to serve: the engines can go."""
        if self.phase is Phase.DRAINING and not self._running("api"):
            self._end_engines()

    def _end_engines(self) -> None:
        self._stop()
        self._tell("engine", pack(Kind.SHUTDOWN, Empty()))
        for child in self._running("engine"):
            if not self.engines[child.spec.identity].is_ready:  # it loads, and listens to nobody
                child.kill()
        self._end_in(GRACE)

    def _fail(self, failure: StartupFailure) -> None:
        """Ends the server. Only the first failure is reported: the others are its consequences."""
        if self.phase is Phase.STOPPING:
            return
        was_serving = self.phase in (Phase.SERVING, Phase.DRAINING)
        self.failure = self.failure or failure
        self.exit_code = ENGINE_FAILED if was_serving else failure.exit_code
        self._stop()
        if was_serving:
            log.error("%s: %s", failure.what, failure.why)
        dead = Status("dead", message=failure.what, engine=ALL_ENGINES)
        self._tell("api", pack(Kind.STATUS, dead))
        self._tell("api", pack(Kind.SHUTDOWN, Empty()))
        self._tell("engine", pack(Kind.SHUTDOWN, Empty()))
        self._end_in(GRACE if was_serving else 0)

    def _end_in(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def _milliseconds_left(self) -> int:
        times = [self._next_look, *(when for when, _ in self._due)]
        if self._deadline is not None:
            times.append(self._deadline)
        return max(0, int((min(times) - time.monotonic()) * 1000) + 1)

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
