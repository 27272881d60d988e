"""Shelf: the models of a server that has several, of which some are in memory."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ..config import Config
from ..served import Budget, ServedModel
from ..sockets import bind_router, readable
from ..wire import LAST_WORDS_OF, Empty, Kind, Order, StartupFailure, Status, Use, identity_of, pack, unpack
from .local import Child, death, start
from .nodes import Neighbours
from .place import Place, holds, to_put_away
from .plan import LOAD, ProcessSpec, data_address, usable_cores
from .restarts import Restarts
from .signals import Signals

log = logging.getLogger(__name__)
KEEPER_ENTRY = "hybrid_serve.launch.keeper:main"
ENGINE_FAILED = 20
RETRY_SECONDS = 30.0  # after a model could not be loaded, until a request tries it again
STOP_SECONDS = 10.0  # that the engines of a model get to end, then they are killed
LAST_WORDS = 0.3  # seconds the report of a child that ended may still be on its way
GRACE = 2.0  # seconds for all to end with the server


class Kept:
    """A place and the child that keeps its engines running, when there is one."""

    def __init__(self, index: int, place: Place, directory: Path, config: Config) -> None:
        self.index, self.place, self.directory = index, place, directory
        self.identity = identity_of("model", index)
        self.child: Child | None = None
        self.is_told_to_end = False
        self.is_greeted = False
        self.due: float | None = None  # to be started again, or tried again, or killed
        self.base: dict[int, int] = {}  # restarts of an engine before this child had it
        self.restarts = Restarts(config.supervision)
        self.last_words: StartupFailure | None = None


class Shelf(Neighbours):
    """Loads what requests wait for, and puts away what was unused for longest when there is no room: a child for each
    model that is in memory (``keeper.py``), which starts its engines, watches them and starts them again. Knows API
    servers by name and by what they do with a model; no request, and nothing of HTTP."""

    def __init__(self, config: Config, models: Sequence[ServedModel], directory: Path, load: str = LOAD) -> None:
        """``load``: see ``plan``."""
        super().__init__()
        self._config, self._directory, self._load = config, directory, load
        self._budget = Budget(config.routing.max_loaded_models, config.routing.max_loaded_bytes)
        self._all = [Kept(index, Place(model), directory / str(index), config) for index, model in enumerate(models)]
        self._by_name = {kept.place.name: kept for kept in self._all}
        self._by_identity = {kept.identity: kept for kept in self._all}
        self._is_leaving = False
        self._context = zmq.Context()
        self._address = f"ipc://{directory}/shelf"
        self._socket = bind_router(self._context, self._address)
        self._poller = zmq.Poller()
        at_once = sorted((len(model.engines) for model in models), reverse=True)
        self._num_cores = max(1, usable_cores() // sum(at_once[: self._budget.max_models or len(models)]))

    # What the supervisor asks and tells

    @property
    def statuses(self) -> list[Status]:
        """A start waits for the models that are to be loaded in it."""
        return [self._as_told(kept, status) for kept in self._all for status in kept.place.statuses.values()]

    def register(self, poller: zmq.Poller) -> None:
        self._poller = poller
        poller.register(self._socket, zmq.POLLIN)

    def take_messages(self) -> None:
        self._receive()
        lives = {kept.child.life: kept for kept in self._all if kept.child is not None}
        for life in select.select(list(lives), [], [], 0)[0]:
            self._ended(lives[life])
        self._arrange()

    def look(self) -> None:
        now = time.monotonic()
        for kept in self._all:
            if kept.due is None or now < kept.due:
                continue
            kept.due = None
            if kept.is_told_to_end and kept.child is not None:
                kept.child.kill()
            elif kept.place.phase == "failed":
                self._set(kept, "unloaded")
            else:
                self._start(kept)
        self._arrange()

    def greet(self, identity: bytes) -> list[list[Any]]:
        for kept in self._all:
            kept.place.greet(identity)
        return [pack(Kind.MODEL, kept.place.state) for kept in self._all]

    def take(self, identity: bytes, kind: bytes, header: bytes) -> None:
        if kind == Kind.USE:
            use = unpack(header, Use)
            self._named(use.name).place.took(identity, use, time.monotonic())
        elif kind == Kind.ORDER:
            order = unpack(header, Order)
            self._take_order(self._named(order.name), order.is_load)
        self._arrange()

    def record(self) -> None:
        for kept in self._all:
            if kept.child is not None and kept.place.phase in ("ready", "draining"):
                os.kill(kept.child.process.pid, Signals.RECORD)  # which its own supervisor handles

    def leave(self) -> None:
        self._is_leaving = True
        for kept in self._all:
            if kept.child is not None and not kept.is_greeted:  # it is starting, and listens to nobody
                kept.child.kill()
            self._send(kept, pack(Kind.SHUTDOWN, Empty()))

    def close(self) -> None:
        if not self._is_leaving:
            self.leave()
        end = time.monotonic() + GRACE
        for kept in self._all:
            if kept.child is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    kept.child.process.wait(max(0.0, end - time.monotonic()))
                kept.child.kill()
                kept.child.reap()
        self._context.destroy(linger=0)

    # Who is in memory

    def _arrange(self) -> None:
        """Whoever is wanted is loaded, in turn, and nobody overtakes: a large model would wait for ever."""
        if self._is_leaving:
            return
        for kept in self._all:
            if kept.place.is_drained and not kept.is_told_to_end:
                self._put_away(kept)
            elif kept.place.is_unwanted and kept.place.may_go:
                self._drain(kept)
        now, places = time.monotonic(), [kept.place for kept in self._all]
        for place in places:
            place.note_wanted(now)
        waiting = [kept for kept in self._all if kept.place.wanted_since is not None]
        for kept in sorted(waiting, key=lambda each: each.place.wanted_since or 0.0):
            in_memory = [place for place in places if place.is_in_memory]
            if not holds(self._budget, [*in_memory, kept.place]):
                for going in to_put_away(kept.place, places, self._budget) or []:
                    self._drain(self._by_name[going.name])
                return
            self._set(kept, "loading")
            self._start(kept)

    def _drain(self, kept: Kept) -> None:
        kept.place.begin_drain()
        self._tell(kept)
        if kept.place.is_drained:  # there is no API server
            self._put_away(kept)

    def _put_away(self, kept: Kept) -> None:
        kept.is_told_to_end, kept.due = True, time.monotonic() + STOP_SECONDS
        self._send(kept, pack(Kind.SHUTDOWN, Empty()))
        if kept.child is None:  # it was about to be started again
            self._gone(kept)

    def _take_order(self, kept: Kept, is_load: bool) -> None:
        place = kept.place
        if is_load:
            place.is_ordered, place.is_unwanted = not place.is_in_memory, False
            if place.phase == "failed":  # asked for by a person: at once
                kept.due = None
                self._set(kept, "unloaded")
        elif place.is_in_memory:
            place.is_unwanted = place.phase != "draining"
        else:
            place.is_ordered = False
            self._tell(kept)

    # Its children

    def _start(self, kept: Kept) -> None:
        model = kept.place.model
        shutil.rmtree(kept.directory, ignore_errors=True)
        kept.directory.mkdir(mode=0o700)
        parallel = replace(
            model.config.parallel,
            headless=True,
            data_parallel_start_rank=model.first_engine,
            data_parallel_size_local=len(model.engines),
        )
        spec = ProcessSpec(
            role="model",
            index=kept.index,
            entry=KEEPER_ENTRY,
            arguments={
                "index": kept.index,
                "control_address": self._address,
                "directory": str(kept.directory),
                "num_api_servers": self._config.server.api_server_count,
                "load": self._load,
                "num_cores": 0 if model.config.engine.cpu_threads else self._num_cores,
            },
        )
        log.info("model %s is being loaded, by %s", model.name, spec.name)
        kept.is_told_to_end = kept.is_greeted = False
        kept.last_words = None
        kept.base = {index: status.restarts for index, status in kept.place.statuses.items()}
        kept.child = start(spec, replace(model.config, parallel=parallel), str(self._directory))
        self._poller.register(kept.child.life, zmq.POLLIN)

    def _ended(self, kept: Kept) -> None:
        child, place = kept.child, kept.place
        assert child is not None
        self._poller.unregister(child.life)
        code, kept.child = child.reap(), None
        if kept.is_told_to_end or self._is_leaving:
            self._gone(kept)
            return
        end = time.monotonic() + LAST_WORDS
        while code > 0 and kept.last_words is None and (left := end - time.monotonic()) > 0:
            self._socket.poll(int(left * 1000) + 1)
            self._receive()
        cause = kept.last_words or death(child, code, ENGINE_FAILED)
        pause = kept.restarts.next_pause(time.monotonic()) if code < 0 and place.phase != "loading" else None
        if pause is None:
            self._failed(kept, cause)
            return
        log.error("model %s: %s: %s; it is started again", place.name, cause.what, cause.why)
        kept.due = time.monotonic() + pause
        for before in list(place.statuses.values()):
            restarts = before.restarts + 1
            self._say(kept, Status("restarting", message=cause.what, restarts=restarts, engine=before.engine))
        if not pause:
            self.look()

    def _failed(self, kept: Kept, cause: StartupFailure) -> None:
        log.error("model %s: %s: %s (fix: %s)", kept.place.name, cause.what, cause.why, cause.fix)
        kept.place.is_ordered, kept.due = False, time.monotonic() + RETRY_SECONDS
        self._set(kept, "failed", f"{cause.what}: {cause.why}")

    def _gone(self, kept: Kept) -> None:
        kept.due, kept.is_told_to_end = None, False
        log.info("model %s is put away", kept.place.name)
        self._set(kept, "unloaded")

    def _set(self, kept: Kept, phase: str, message: str = "") -> None:
        """Of the model; API servers hear of its engines first."""
        place = kept.place
        place.phase, place.message = phase, message
        if phase in ("unloaded", "failed"):
            for before in list(place.statuses.values()):
                gone = Status(phase, message=message, restarts=before.restarts, engine=before.engine)
                self._say(kept, gone)
        self._tell(kept)

    # What is said

    def _receive(self) -> None:
        while readable(self._socket):
            frames = self._socket.recv_multipart()
            try:
                identity, kind, header = frames
                self._take_from_child(identity, kind, header)
            except (ValueError, KeyError, msgspec.DecodeError) as error:  # not three frames, or not ours
                log.warning("message of a model, of %d frames, dropped: %s", len(frames), error)

    def _take_from_child(self, identity: bytes, kind: bytes, header: bytes) -> None:
        kept = self._by_identity[identity.removeprefix(LAST_WORDS_OF)]
        if kind == Kind.FAILED:
            kept.last_words = unpack(header, StartupFailure)
        elif kind == Kind.HELLO:
            kept.is_greeted = True
            if kept.is_told_to_end:  # it could not be told before
                self._send(kept, pack(Kind.SHUTDOWN, Empty()))
        elif kind == Kind.STATUS and kept.child is not None:
            self._take_status(kept, unpack(header, Status))
        else:
            raise ValueError(f"kind {kind!r}")

    def _take_status(self, kept: Kept, status: Status) -> None:
        place = kept.place
        address = data_address(kept.directory, status.engine)
        restarts = status.restarts + kept.base[status.engine]
        self._say(kept, msgspec.structs.replace(status, address=address, restarts=restarts))
        if place.phase == "loading" and place.is_served:
            log.info("model %s is ready", place.name)
            place.used_at, place.is_ordered = time.monotonic(), False
            self._set(kept, "ready")

    def _say(self, kept: Kept, status: Status) -> None:
        status = kept.place.said(status)
        self.on_status(self._as_told(kept, status))

    @staticmethod
    def _as_told(kept: Kept, status: Status) -> Status:
        """One that a start is to wait for is not called unloaded before it was tried."""
        if status.phase == "unloaded" and kept.place.is_ordered:
            return msgspec.structs.replace(status, phase="starting")
        return status

    def _tell(self, kept: Kept) -> None:
        self.on_news(pack(Kind.MODEL, kept.place.state))

    def _send(self, kept: Kept, message: list[Any]) -> None:
        if kept.is_greeted and kept.child is not None:
            with contextlib.suppress(zmq.ZMQError):  # it has just ended
                self._socket.send_multipart([kept.identity, *message], flags=zmq.NOBLOCK)

    def _named(self, name: str) -> Kept:
        if name not in self._by_name:
            raise ValueError(f"no model {name!r}")
        return self._by_name[name]
