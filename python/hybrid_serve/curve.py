"""Who may connect over a network: a key file, and the gate that knows its key. Knows no message."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from .errors import StartupError

log = logging.getLogger(__name__)
DOMAIN = b"hybrid-serve"  # of the gate
HANDSHAKE_MS = 5000  # then the library ends a connection that has not come so far
_SLACK = 0.5  # seconds that it may be late, and its news of a handshake
_ZAP_ADDRESS, _EVENTS_ADDRESS = "inproc://zeromq.zap.01", "inproc://handshakes"
_FILE_FAULT = "HS-E046"


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A CURVE key pair (Z85). Every machine of one deployment has the same: it says who is the server to clients, and
    it is the only client that servers know."""

    public: str
    secret: str


def make_key_file(path: Path) -> None:
    """Only this user can read it. Raises OSError, FileExistsError among them."""
    public, secret = zmq.curve_keypair()
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(Keys(public.decode(), secret.decode())) + b"\n")


def read_key_file(path: Path) -> Keys:
    """Raises StartupError (HS-E046) for one that is not there, that others may read, or that holds no key."""
    what = f"key file {path} cannot be used"
    try:
        with path.open("rb") as file:
            status, data = os.fstat(file.fileno()), file.read(4096)
    except OSError as error:
        fix = f"hybrid-serve keys {path} makes one; copy it to the other machines"
        raise StartupError(_FILE_FAULT, what, error.strerror or str(error), fix, 14) from error
    if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid not in (os.getuid(), 0):
        why = f"its mode is {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}: others could take part"
        raise StartupError(_FILE_FAULT, what, why, f"chmod 600 {path}", 14)
    try:
        keys = msgspec.json.decode(data, type=Keys)
        is_pair = zmq.curve_public(keys.secret.encode()) == keys.public.encode()
    except (msgspec.DecodeError, ValueError, zmq.ZMQError):
        is_pair = False
    if not is_pair:
        fix = "hybrid-serve keys makes a file; copy it as it is"
        raise StartupError(_FILE_FAULT, what, "it does not hold a key pair", fix, 14)
    return keys


class Gate:
    """Answers for the socket that it guards whether a peer's key is ours; a thread, as the owner of the socket may be
    busy. Whoever has another key, or none, is not heard at all: no byte of his reaches a message."""

    def __init__(self, context: zmq.Context[Any], keys: Keys) -> None:
        self.context, self.keys = context, keys
        self.num_refused = 0  # connections so far; a new one is in it when its time for the handshake is over
        self._handshakes, self._num_told = Handshakes(), 0
        self._allowed = {keys.public}
        # Of a shadow: ``destroy`` would close them under the thread that waits on them, which then aborts the process.
        shadow: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
        self._questions: zmq.Socket[bytes] = shadow.socket(zmq.REP)
        self._events: zmq.Socket[bytes] = shadow.socket(zmq.PAIR)
        self._questions.setsockopt(zmq.LINGER, 0)
        self._questions.bind(_ZAP_ADDRESS)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Before it is bound; one socket of the context."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.monitor(_EVENTS_ADDRESS, zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._events.connect(_EVENTS_ADDRESS)
        threading.Thread(target=self._work_forever, daemon=True, name="gate").start()

    def _work_forever(self) -> None:
        """Until the context ends."""
        poller = zmq.Poller()
        poller.register(self._questions, zmq.POLLIN)
        poller.register(self._events, zmq.POLLIN)
        try:
            while True:
                for socket, _ in poller.poll(1000 if self._handshakes.is_undecided else None):
                    if socket is self._questions:
                        self._questions.send_multipart(self._answer(self._questions.recv_multipart()))
                    else:
                        self._handshakes.saw(parse_monitor_message(self._events.recv_multipart())["event"])
                self.num_refused = self._handshakes.num_failed()
        except zmq.ZMQError:
            self._questions.close()
            self._events.close(linger=0)

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        """RFC 27: version, request id, domain, address, identity, mechanism, key."""
        version, request_id, domain, address, _, mechanism, *credentials = frames
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        if domain == DOMAIN and key in self._allowed:
            return [version, request_id, b"200", b"", b"", b""]
        self._num_told += 1
        if self._num_told & (self._num_told - 1) == 0:  # 1, 2, 4, 8 ...: a flood must not flood the log
            log.warning("peer %d refused, from %s: not our key", self._num_told, address.decode(errors="replace"))
        return [version, request_id, b"400", b"not our key", b"", b""]


class Handshakes:
    """How many connections never became one of ours. The library says when one is accepted and when a handshake
    succeeds, but not whose, and of what is no handshake at all nothing; so they are told apart by time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: deque[float] = deque()  # when those were accepted that may still succeed
        self._num_late = self._num_succeeded = self._num_failed = 0

    def saw(self, event: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._pending.append(self._clock())
        else:
            self._num_succeeded += 1

    @property
    def is_undecided(self) -> bool:
        """Whether ``num_failed`` may change without news."""
        return bool(self._pending)

    def num_failed(self) -> int:
        """Never less than before."""
        latest = self._clock() - HANDSHAKE_MS / 1000 - _SLACK
        while self._pending and self._pending[0] < latest:
            self._pending.popleft()
            self._num_late += 1
        self._num_failed = max(self._num_failed, self._num_late - self._num_succeeded)
        return self._num_failed
