"""Children on this machine: a fresh interpreter each, tied to its parent by a socket pair."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import ClassVar

import msgspec

from ..config import Config
from ..control_group import memory_limit, oom_kills
from ..errors import mib, smaller_cache
from ..wire import EngineFacts, StartupFailure
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

    num_explained: ClassVar = 0  # deaths of children for which one of the system's kills was found

    def __init__(self, spec: ProcessSpec, process: subprocess.Popen[bytes], life: socket.socket) -> None:
        self.spec, self.process, self.life = spec, process, life
        self.peak_bytes = 0  # of memory that it had; known when it has ended
        self._kills_before = (oom_kills() or 0) - Child.num_explained

    def reap(self) -> int:
        """Waits for the end that ``life`` has announced. The exit code; -N: killed by signal N."""
        self.life.close()
        with contextlib.suppress(ChildProcessError):
            _, status, used = os.wait4(self.process.pid, 0)
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.peak_bytes = used.ru_maxrss * 1024
        return self.process.wait()

    def was_killed_for_memory(self) -> bool:
        """Of one that SIGKILL ended, to be asked once: whether the system has killed for lack of memory since it was
        started, and not another child."""
        if (oom_kills() or 0) - Child.num_explained <= self._kills_before:
            return False
        Child.num_explained += 1
        return True

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


def death(child: Child, code: int, exit_code: int, facts: EngineFacts | None = None) -> StartupFailure:
    """What to say of a child that ended without a word; ``facts``: of an engine, where they are known."""
    what = f"{child.spec.name} (pid {child.process.pid}) died"
    if code >= 0:
        why, fix = f"it ended with exit code {code}, although nobody asked it to", "look at the log above"
    else:
        name = signal.Signals(-code).name
        why, fix = f"it was killed by {name}", "the log above may have its stack"
        if -code == signal.SIGKILL and child.was_killed_for_memory():
            limit = memory_limit()
            there = f"the control group may take {mib(limit)}" if limit else f"the machine has {mib(_installed())}"
            why = f"it was killed by the system for lack of memory (OOM): it had {mib(child.peak_bytes)}, {there}"
            fix = f"{smaller_cache(facts.cache_bytes if facts else 0)}, or a larger limit"
        elif -code == signal.SIGKILL and oom_kills() is not None:
            why += " and not by the system for lack of memory, which it counts"
            fix = "look for who may have: a service manager, a job scheduler, a guard against lack of memory"
        elif -code == signal.SIGKILL:
            why += ", by somebody, or by the system for lack of memory"
            fix = f"if it was memory: {smaller_cache(facts.cache_bytes if facts else 0)}"
    return StartupFailure("HS-E202", what, why, fix, exit_code)


def _installed() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
