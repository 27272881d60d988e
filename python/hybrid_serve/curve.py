"""Who may connect over a network: a key file, and the gate that knows its key. Knows no message."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.utils import z85

from .errors import StartupError

log = logging.getLogger(__name__)
DOMAIN = b"hybrid-serve"  # of the gate
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
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
    """Answers for every socket of its context whether a peer's key is ours; a thread, as the owner of the sockets may
    be busy. Whoever has another key, or none, is not heard at all: no byte of his reaches a message."""

    def __init__(self, context: zmq.Context[Any], keys: Keys) -> None:
        self.context, self.keys, self.num_refused = context, keys, 0
        self._allowed = {keys.public}
        # Of a shadow: ``destroy`` would close it under the thread that waits on it, which then aborts the process.
        self._socket: zmq.Socket[bytes] = zmq.Context.shadow(context.underlying).socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ADDRESS)
        threading.Thread(target=self._answer_forever, daemon=True, name="gate").start()

    def _answer_forever(self) -> None:
        """Until the context ends."""
        try:
            while True:
                frames = self._socket.recv_multipart()
                self._socket.send_multipart(self._answer(frames))
        except zmq.ZMQError:
            self._socket.close()

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        """RFC 27: version, request id, domain, address, identity, mechanism, key."""
        version, request_id, domain, address, _, mechanism, *credentials = frames
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        if domain == DOMAIN and key in self._allowed:
            return [version, request_id, b"200", b"", b"", b""]
        self.num_refused += 1
        if self.num_refused & (self.num_refused - 1) == 0:  # 1, 2, 4, 8 ...: a flood must not flood the log
            log.warning("peer %d refused, from %s: not our key", self.num_refused, address.decode(errors="replace"))
        return [version, request_id, b"400", b"not our key", b"", b""]
