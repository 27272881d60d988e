"""Nodes: the machines whose headless engines have joined this head."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ..config import Config
from ..curve import Gate, read_key_file
from ..errors import StartupError
from ..sockets import bind_router, readable, tcp_address
from ..wire import Empty, Hello, Kind, Refused, StartupFailure, Status, Welcome, pack, unpack
from .handshake import node_refusal
from .listener import port_holder

log = logging.getLogger(__name__)


class Neighbours:
    """Engines that others start, on other machines or of several models, as a supervisor sees them: here none."""

    def __init__(self) -> None:
        self.on_status: Callable[[Status], None] = lambda status: None  # of an engine there
        self.on_end: Callable[[StartupFailure | None], None] = lambda failure: None  # end, in order or by that failure
        self.on_news: Callable[[list[Any]], None] = lambda message: None  # to be passed on to API servers

    @property
    def statuses(self) -> Sequence[Status]:
        """Of all engines there, also of those that are to come."""
        return ()

    def register(self, poller: zmq.Poller) -> None:
        """Whatever wakes the supervisor for ``take_messages``."""

    def take_messages(self) -> None: ...
    def look(self) -> None:
        """To be called several times in the time that a silence may last."""

    def greet(self, identity: bytes) -> list[list[Any]]:
        """What an API server must be told that has just come."""
        return []

    def take(self, identity: bytes, kind: bytes, header: bytes) -> None:
        """What an API server says of models. Raises ValueError for what is none."""
        raise ValueError(f"kind {kind!r}")

    def publish(self, status: Status) -> None:
        """News of an engine of this supervisor."""

    def given_up(self, status: Status) -> None:
        """An engine there died too often: nobody starts it again."""

    def record(self) -> None:
        """Engines there shall keep a flight recording."""

    def leave(self) -> None:
        """This supervisor ends."""

    def close(self) -> None: ...


@dataclass
class Node:
    hello: Hello
    heard: float
    ranks: range
    base: dict[int, int] = field(default_factory=dict)  # restarts of a rank before this node had it


class Nodes(Neighbours):
    """Lets nodes join that have our key, version and options, says whom they are to serve, and notices when one is
    gone. Knows their engines' states; not API servers, not requests, which go to the engines themselves."""

    def __init__(self, config: Config) -> None:
        """Listens. Raises StartupError for a bad key file or an address that cannot be had."""
        super().__init__()
        parallel = config.parallel
        self._digest, self._ranks = config.engine_digest(), parallel.remote_ranks
        self._welcome = pack(Kind.WELCOME, Welcome(config.server.api_server_count))
        self._limit = config.supervision.engine_heartbeat_timeout
        self._nodes: dict[bytes, Node] = {}
        self._refused_told = 0
        # Whether somebody starts again what is lost, and nobody needs to give up requests that wait for it.
        self._is_managed = parallel.is_ray
        absent = "starting" if self._is_managed else "away"
        self._statuses = {rank: Status(absent, engine=rank) for rank in self._ranks}
        keys = read_key_file(Path(parallel.data_parallel_key_file))
        self._context = zmq.Context()
        self.gate = Gate(self._context, keys)
        address, port = parallel.data_parallel_address, parallel.data_parallel_rpc_port
        try:
            self.socket = bind_router(self._context, tcp_address(address, port), self.gate)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise _cannot_listen(address, port, error) from error

    @property
    def statuses(self) -> list[Status]:
        return list(self._statuses.values())

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self.socket, zmq.POLLIN)

    def take_messages(self) -> None:
        while readable(self.socket):
            frames = self.socket.recv_multipart()
            try:
                identity, kind, header = frames
                self._take(identity, kind, header)
            except (ValueError, msgspec.DecodeError) as error:  # not three frames, or not ours
                log.warning("message of a node, of %d frames, dropped: %s", len(frames), error)

    def look(self) -> None:
        if self.gate.num_refused != self._refused_told:
            self._refused_told = self.gate.num_refused
            self.on_news(self._refused())
        for identity, node in list(self._nodes.items()):
            silence = time.monotonic() - node.heard
            if silence > self._limit:
                why = f"it said nothing for {silence:.1f} s"
                self._send(identity, pack(Kind.FAILED, _failure("the head gave these engines up", why)))
                self._lost(identity, why)
            elif not self._send(identity, pack(Kind.PULSE, Empty())):
                self._lost(identity, "its connection ended")

    def greet(self, identity: bytes) -> list[list[Any]]:
        return [self._refused()]

    def _refused(self) -> list[Any]:
        return pack(Kind.REFUSED, Refused(self._refused_told))

    def given_up(self, status: Status) -> None:
        before = self._statuses[status.engine]
        self._tell(msgspec.structs.replace(status, facts=before.facts, restarts=before.restarts))
        if all(each.phase == "dead" for each in self._statuses.values()):
            fix = "the log above says what became of the engines"
            self.on_end(StartupFailure("HS-E202", "no engine is left", status.message, fix, 20))

    def leave(self) -> None:
        for identity in self._nodes:
            self._send(identity, pack(Kind.SHUTDOWN, Empty()))

    def close(self) -> None:
        self._context.destroy(linger=200)

    def _take(self, identity: bytes, kind: bytes, header: bytes) -> None:
        node = self._nodes.get(identity)
        if kind == Kind.HELLO:
            self._greet(identity, unpack(header, Hello))
        elif node is None:
            if kind != Kind.LEAVE:
                self._send(identity, pack(Kind.FAILED, _failure("the head does not know these engines", "it forgot")))
        elif kind == Kind.STATUS:
            node.heard = time.monotonic()
            self._take_status(node, unpack(header, Status))
        elif kind == Kind.PULSE:
            node.heard = time.monotonic()
        elif kind == Kind.LEAVE:
            self._lost(identity, "it left")
        else:
            raise ValueError(f"kind {kind!r}")

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if identity in self._nodes:  # it asked again before it had the answer
            self._send(identity, self._welcome)
            return
        failure = node_refusal(hello, self._ranks, self._digest)
        if failure is not None:
            log.warning("%s: %s", failure.what, failure.why)
            self._send(identity, pack(Kind.FAILED, failure))
            return
        ranks = range(hello.index, hello.index + hello.count)
        taken = {rank for node in self._nodes.values() for rank in node.ranks}.intersection(ranks)
        if taken:  # perhaps by one that is gone, which will be known soon: it asks again
            log.warning("a node wants the ranks %s, which have joined", sorted(taken))
            return
        log.info("engines %d to %d join", ranks[0], ranks[-1])
        base = {rank: self._statuses[rank].restarts for rank in ranks}
        self._nodes[identity] = Node(hello, time.monotonic(), ranks, base)
        self._send(identity, self._welcome)

    def _take_status(self, node: Node, status: Status) -> None:
        if status.engine not in node.ranks:
            raise ValueError(f"status of engine {status.engine} from a node with {node.ranks}")
        before = self._statuses[status.engine]
        restarts, facts = status.restarts + node.base[status.engine], status.facts or before.facts
        status = msgspec.structs.replace(status, restarts=restarts, facts=facts)
        if status != before:  # each is said again from time to time
            self._tell(status)

    def _lost(self, identity: bytes, why: str) -> None:
        node = self._nodes.pop(identity)
        log.warning("engines %d to %d are away: %s", node.ranks[0], node.ranks[-1], why)
        for rank in node.ranks:
            before = self._statuses[rank]
            if before.phase == "dead":
                continue  # it was given up, and does not come back
            phase, restarts = ("restarting", before.restarts + 1) if self._is_managed else ("away", before.restarts)
            self._tell(Status(phase, message=why, facts=before.facts, restarts=restarts, engine=rank))

    def _tell(self, status: Status) -> None:
        self._statuses[status.engine] = status
        self.on_status(status)

    def _send(self, identity: bytes, message: list[Any]) -> bool:
        """False if the node is gone."""
        try:
            self.socket.send_multipart([identity, *message], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True


def _failure(what: str, why: str) -> StartupFailure:
    return StartupFailure("HS-E204", what, why, "look at the network between them, and start them again", 20)


def _cannot_listen(address: str, port: int, error: zmq.ZMQError) -> StartupError:
    if error.errno == zmq.EADDRINUSE:
        holder = port_holder(port) or "a process that this user may not see"
        fix = "--data-parallel-rpc-port with another one"
        return StartupError("HS-E031", f"port {port} for headless engines is in use", f"by {holder}", fix, 13)
    fix = "--data-parallel-address with an address of this machine"
    what = f"{address} port {port} for headless engines cannot be bound"
    return StartupError("HS-E032", what, zmq.strerror(error.errno or 0), fix, 13)
