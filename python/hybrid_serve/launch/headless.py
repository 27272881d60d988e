"""Headless engines: those of a machine without API servers, which serve for a head on another one."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from .. import __version__
from ..config import Config
from ..curve import Keys, read_key_file
from ..errors import StartupError
from ..sockets import connect_dealer, readable, tcp_address
from ..wire import PROTOCOL_VERSION, Empty, Hello, Kind, StartupFailure, Status, Welcome, pack, unpack
from .engines import close_all, make_heartbeats
from .nodes import Neighbours
from .plan import Joined, plan
from .report import PlainReporter, Reporter
from .run_directory import RunDirectory
from .signals import Signals
from .supervisor import Supervisor

log = logging.getLogger(__name__)
ASK_SECONDS = 1.0  # between two HELLOs, until the head answers
MOST_REFUSALS = 3  # of the connection itself: the head is there, and does not like our key


def serve(config: Config, reporter: Reporter | None = None, **plan_options: Any) -> int:
    """Joins the head, runs the engines until it or a signal says stop: 0. Raises StartupError, with nothing left
    running, if the head refuses them or is lost, or as ``supervisor.serve`` does. ``plan_options``: see ``plan``."""
    reporter = reporter or PlainReporter(config)
    with RunDirectory() as directory:
        head = Head(config, read_key_file(Path(config.parallel.data_parallel_key_file)))
        heartbeat_fds = make_heartbeats(config)
        try:
            reporter.bound(head.address)
            joined = head.join()
            if isinstance(joined, int):
                return 128 + joined
            specs = plan(config, directory, joined, heartbeat_fds, **plan_options)
            supervisor = Supervisor(config, directory, specs, reporter, head)
            try:
                return supervisor.run()
            finally:
                supervisor.close()
        finally:
            head.close()
            close_all(heartbeat_fds)


def main(config: Config, *, control_address: str, **plan_options: Any) -> None:
    """``serve`` as a child of somebody who starts engines on machines, and hears at that address why they failed."""
    serve(config, **plan_options)


class Head(Neighbours):
    """The head, as a node's supervisor sees it: one connection, over which it says what its engines do. Knows no
    request and no API server: these connect to the engines."""

    def __init__(self, config: Config, keys: Keys) -> None:
        super().__init__()
        parallel = config.parallel
        self._ranks, self._digest = parallel.local_ranks, config.engine_digest()
        self._limit = config.supervision.engine_heartbeat_timeout
        self._host, self._port = parallel.data_parallel_address.strip("[]"), parallel.data_parallel_rpc_port
        self.address = tcp_address(self._host, self._port)
        self._context = zmq.Context()
        # Another name each time: who comes back is told apart from who is still there.
        identity = b"node-%d-" % self._ranks[0] + secrets.token_hex(4).encode()
        self.socket = connect_dealer(self._context, self.address, identity, keys)
        self._heard = time.monotonic()
        self._last: dict[int, Status] = {}

    def join(self) -> Joined | int:
        """Waits until the head takes us, or for a signal, whose number it is. Raises StartupError if it refuses."""
        hello = Hello("node", self._ranks[0], 0, PROTOCOL_VERSION, __version__, self._digest, len(self._ranks))
        monitor, num_refusals, asked, signals = self.socket.get_monitor_socket(), 0, 0.0, Signals()
        poller = zmq.Poller()
        for each in (self.socket, monitor, signals.readable):
            poller.register(each, zmq.POLLIN)
        try:
            while True:
                if readable(self.socket):
                    return self._answer(self.socket.recv_multipart())
                if numbers := signals.take():
                    return numbers[0]
                while monitor.poll(0):
                    num_refusals = self._refusals(num_refusals, int(recv_monitor_message(monitor)["event"]))
                if time.monotonic() - asked > ASK_SECONDS and self.socket.poll(0, zmq.POLLOUT):
                    asked = time.monotonic()
                    self.socket.send_multipart(pack(Kind.HELLO, hello), flags=zmq.NOBLOCK)
                poller.poll(int(ASK_SECONDS * 1000))
        finally:
            self.socket.disable_monitor()
            monitor.close()
            signals.close()

    def _refusals(self, so_far: int, event: int) -> int:
        """A peer with another key ends the connection in the middle of the handshake, without a word."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return 0
        is_refusal = event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        if is_refusal or event == zmq.EVENT_DISCONNECTED:
            so_far += 1
        if so_far >= MOST_REFUSALS:
            what, why = f"the head at {self.address} refuses the connection", "it has another key, or is no head"
            raise StartupError("HS-E046", what, why, "copy the head's --data-parallel-key-file to this machine", 14)
        return so_far

    def _answer(self, frames: list[bytes]) -> Joined:
        self._heard = time.monotonic()
        kind, header = frames
        if kind == Kind.FAILED:
            raise StartupError.of(unpack(header, StartupFailure))
        return Joined(self._own_host(), unpack(header, Welcome).num_api_servers)

    def _own_host(self) -> str:
        """The address of this machine that packets to the head come from: there the head's API servers reach us."""
        family, kind, _, _, address = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self.socket, zmq.POLLIN)

    def take_messages(self) -> None:
        while readable(self.socket):
            frames = self.socket.recv_multipart()
            self._heard = time.monotonic()
            try:
                kind, header = frames
                if kind == Kind.SHUTDOWN:
                    self.on_end(None)
                elif kind == Kind.FAILED:
                    self.on_end(unpack(header, StartupFailure))
            except (ValueError, msgspec.DecodeError) as error:
                log.warning("message of the head, of %d frames, dropped: %s", len(frames), error)

    def look(self) -> None:
        for status in self._last.values():  # again: a connection that was made anew may have lost one
            self._send(pack(Kind.STATUS, status))
        self._send(pack(Kind.PULSE, Empty()))
        silence = time.monotonic() - self._heard
        if silence > self._limit:
            why, fix = f"it said nothing for {silence:.1f} s", "start the engines again when the head is there"
            self.on_end(StartupFailure("HS-E204", f"the head at {self.address} is gone", why, fix, 20))

    def publish(self, status: Status) -> None:
        self._last[status.engine] = status
        self._send(pack(Kind.STATUS, status))

    def leave(self) -> None:
        self._send(pack(Kind.LEAVE, Empty()))

    def close(self) -> None:
        self._context.destroy(linger=500)  # that we leave is still to be said

    def _send(self, message: list[Any]) -> None:
        try:
            self.socket.send_multipart(message, flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EAGAIN:
                raise
            log.debug("the head is not there")
