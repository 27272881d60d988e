"""Children on this machine: a fresh interpreter each, tied to its parent by a socket pair."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

import msgspec

from ..config import Config
from ..wire import StartupFailure
from .plan import ProcessSpec

# The child looks for modules where its parent does, wherever it is run; -c and not -m, which would put the current
# folder first.
_BOOT = "import sys; sys.path[:] = sys.argv[2].split(chr(10)); from hybrid_serve.launch.child import main; main()"


class Order(msgspec.Struct, frozen=True):
    """What a child is told, first and only once, over the socket pair."""

    config: Config
    spec: ProcessSpec
    run_directory: str


class Child:
    """A running process. ``life`` becomes readable when it ends, by whatever cause; and the other way round."""

    def __init__(self, spec: ProcessSpec, process: subprocess.Popen[bytes], life: socket.socket) -> None:
        self.spec, self.process, self.life = spec, process, life

    def reap(self) -> int:
        """Waits for the end that ``life`` has announced. The exit code; -N: killed by signal N."""
        self.life.close()
        return self.process.wait()

    def kill(self) -> None:
        """The end is still to be awaited by ``reap``."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)


def start(spec: ProcessSpec, config: Config, run_directory: str) -> Child:
    """Starts the child and returns at once."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(theirs.fileno()), "\n".join(sys.path)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), *spec.inherited_fds),
            env={**os.environ, **spec.environment},
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone, who ends them in order
        )
    # Over the socket: the configuration holds keys, which arguments and environment would show to others.
    order = msgspec.json.encode(Order(config, spec, run_directory))
    with contextlib.suppress(BrokenPipeError):  # it died already; its end is reported like any other
        ours.sendall(len(order).to_bytes(4, "little") + order)
    return Child(spec, process, ours)


def read_order(life: socket.socket) -> Order:
    """The child's side of ``start``. Raises EOFError if the parent is gone."""
    return msgspec.json.decode(_read(life, int.from_bytes(_read(life, 4), "little")), type=Order)


def _read(life: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = life.recv(size - len(data))
        if not part:
            raise EOFError("the parent is gone")
        data += part
    return bytes(data)


def death(child: Child, code: int, exit_code: int) -> StartupFailure:
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
    return StartupFailure("HS-E202", what, why, fix, exit_code)
