"""A real server under test: `hybrid-serve serve` as a child process, its log, its children, its address."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import psutil

DEADLINE = 60.0


def wait_until(condition: Callable[[], object], what: str, timeout: float = DEADLINE) -> None:
    """Polls; fails with ``what`` when the time is over."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s for: {what}"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Server:
    """One running `hybrid-serve serve`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
        self.process, self.port, self._log = process, port, log
        self.url = f"http://127.0.0.1:{port}"

    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def ready(self) -> bool:
        assert self.process.poll() is None, f"server exited with {self.process.returncode}:\n{self.log()}"
        try:
            return httpx.get(self.url + "/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def tree(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def child(self, title: str) -> psutil.Process:
        for process in self.tree():
            if title in " ".join(process.cmdline()):
                return process
        raise AssertionError(f"no process titled {title!r} among {[p.cmdline() for p in self.tree()]}")

    def metric(self, name: str) -> float:
        """Sum of a metric's samples; 0 where it has none yet."""
        text = httpx.get(self.url + "/metrics", timeout=10).text
        return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE))


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "hybrid_serve", *args]


@contextmanager
def serving(*args: str, env: dict[str, str] | None = None, patience: float = DEADLINE) -> Iterator[Server]:
    """Starts a server on a free port, waits until it is ready, stops it (SIGTERM, then SIGKILL) at the end."""
    port = free_port()
    with (
        tempfile.NamedTemporaryFile(prefix="hybrid-serve-test-", suffix=".log") as log,
        tempfile.TemporaryDirectory(prefix="hybrid-serve-test-") as recordings,
    ):
        process = subprocess.Popen(
            command("serve", *args, "--port", str(port)),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HYBRID_SERVE_FLIGHT_RECORDER_DIR": recordings, **(env or {})},
        )
        server = Server(process, port, log)
        try:
            wait_until(server.ready, "the server is ready", patience)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait(10)
