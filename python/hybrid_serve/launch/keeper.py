"""The child that keeps one model of several: a supervisor of its engines alone, which ends when it is put away."""

from __future__ import annotations

import os
from pathlib import Path

import zmq

from .. import __version__
from ..config import Config
from ..sockets import connect_dealer, readable
from ..wire import PROTOCOL_VERSION, Hello, Kind, Status, identity_of, pack
from .engines import close_all, make_heartbeats
from .nodes import Neighbours
from .plan import Joined, plan
from .supervisor import Supervisor


def main(
    config: Config, *, index: int, control_address: str, directory: str, num_api_servers: int, load: str, num_cores: int
) -> None:
    """Returns when the shelf says stop. Raises StartupError if the model cannot be loaded, or its engines die too
    often. ``num_cores``: see ``plan``."""
    heartbeat_fds = make_heartbeats(config)
    line = ShelfLine(control_address, index)
    try:
        joined = Joined("", num_api_servers)
        specs = plan(config, Path(directory), joined, heartbeat_fds, load=load, num_cores=num_cores)
        supervisor = Supervisor(config, Path(directory), specs, Silent(), line)
        try:
            supervisor.run()
        finally:
            supervisor.close()
    finally:
        line.close()
        close_all(heartbeat_fds)


class ShelfLine(Neighbours):
    """The shelf, as a keeper's supervisor sees it: it is told what the engines do, and says when they shall end."""

    def __init__(self, address: str, index: int) -> None:
        super().__init__()
        self._context = zmq.Context()
        self._socket = connect_dealer(self._context, address, identity_of("model", index))
        hello = Hello("model", index, os.getpid(), PROTOCOL_VERSION, __version__, "")
        self._socket.send_multipart(pack(Kind.HELLO, hello))

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self._socket, zmq.POLLIN)

    def take_messages(self) -> None:
        while readable(self._socket):
            if self._socket.recv_multipart()[0] == Kind.SHUTDOWN:
                self.on_end(None)

    def publish(self, status: Status) -> None:
        self._socket.send_multipart(pack(Kind.STATUS, status))

    def close(self) -> None:
        self._context.destroy(linger=200)


class Silent:
    """A Reporter: what there is to say of a model, the shelf says."""

    def bound(self, url: str) -> None: ...
    def status(self, status: Status) -> None: ...
    def ready(self) -> None: ...
    def draining(self, timeout: float) -> None: ...
