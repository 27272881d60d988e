"""A whole server as child of a test: supervisor, engine with the fake model, stand-in API server."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 10.0  # seconds until a test gives up

_MAIN = """
import sys
sys.path[:] = {path!r}
from hybrid_serve.config import Config, ModelConfig, ParallelConfig, SchedulerConfig, ServerConfig, SupervisionConfig
from hybrid_serve.errors import StartupError, box
from hybrid_serve.launch import headless, supervisor
config = Config(model=ModelConfig(model={model!r}, **{model_options!r}), server=ServerConfig(**{server!r}),
                supervision=SupervisionConfig(**{supervision!r}), scheduler=SchedulerConfig(**{scheduler!r}),
                parallel=ParallelConfig(**{parallel!r}))
serve = headless.serve if config.parallel.headless else supervisor.serve
try:
    raise SystemExit(serve(config, load={load!r}, api_entry={api_entry!r}, **{plan_options!r}))
except StartupError as error:
    print(box(error.failure), file=sys.stderr)
    raise SystemExit(error.failure.exit_code)
"""


class ServerProcess:
    """Started on entering; on leaving nothing of it is left, which is checked."""

    def __init__(
        self,
        directory: Path,
        model: str = "fake",
        load: str = "fake_executor:load",
        api_entry: str = "api_child:main",
        output_fd: int | None = None,
        model_options: dict[str, Any] | None = None,
        supervision: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        parallel: dict[str, Any] | None = None,
        plan_options: dict[str, Any] | None = None,
        group: Path | None = None,
        **server: Any,
    ) -> None:
        """``group``: the folder of a control group for it to be in."""
        self._output_fd = output_fd
        server = {"port": 0, "shutdown_timeout": 5.0} | server
        self.recordings = directory / "recordings"
        self.recordings.mkdir(exist_ok=True)
        supervision = {"flight_recorder_dir": str(self.recordings)} | (supervision or {})
        join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')" if group else ""
        code = join + _MAIN.format(
            path=sys.path,
            model=model,
            model_options=model_options or {},
            server=server,
            supervision=supervision,
            scheduler=scheduler or {},
            parallel=parallel or {},
            plan_options=plan_options or {},
            load=load,
            api_entry=api_entry,
        )
        self.run_directory = directory
        self._output = directory / "output"
        self._errors = directory / "errors"
        self._code = code
        self.family: list[psutil.Process] = []
        self._connections: list[socket.socket] = []

    def __enter__(self) -> ServerProcess:
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self._code],
                stdout=output if self._output_fd is None else self._output_fd,
                stderr=errors,
                env={**os.environ, "XDG_RUNTIME_DIR": str(self.run_directory)},
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.remember_family()
        self.process.kill()
        self.process.wait()
        for connection in self._connections:
            connection.close()
        for process in self.family:
            if process.is_running():
                process.kill()

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"output:\n{self.output}\nerrors:\n{self.errors}"
            time.sleep(0.005)

    def wait_ready(self, seconds: float = PATIENCE) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.errors
            return "ready in" in self.output

        self.wait(is_ready, seconds)
        self.remember_family()

    def wait_exit(self, seconds: float = PATIENCE) -> int:
        self.wait(lambda: self.process.poll() is not None, seconds)
        assert self.process.returncode is not None
        return self.process.returncode

    def remember_family(self) -> None:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self.family += [process for process in found if process not in self.family]

    def child(self, role: str, index: int = 0) -> psutil.Process:
        """The one that lives, by its title, ``hybrid-serve: engine 0``."""
        self.wait(lambda: self._find(f"hybrid-serve: {role} {index}"))
        return self._find(f"hybrid-serve: {role} {index}")[0]

    def _find(self, title: str) -> list[psutil.Process]:
        self.remember_family()
        return [process for process in self.family if _is_alive(process) and process.cmdline()[:1] == [title]]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    @property
    def address(self) -> tuple[str, int]:
        found = re.search(r"http://(127\.0\.0\.1):(\d+) is bound", self.output)
        assert found, self.output
        return found[1], int(found[2])

    def ask(self, line: str, port: int = 0) -> socket.socket:
        """A connection to the stand-in, with its line sent."""
        address = ("127.0.0.1", port) if port else self.address
        connection = socket.create_connection(address, timeout=PATIENCE)
        self._connections.append(connection)
        connection.sendall(f"{line}\n".encode())
        return connection

    def open_stream(self, max_tokens: int = 4000) -> socket.socket:
        """One whose first token is on its way back; of prompt 0 1 2 3 with seed 1."""
        connection = self.ask(f"4 1 {max_tokens}")
        assert connection.recv(1, socket.MSG_PEEK)
        return connection

    def check_nothing_is_left(self, seconds: float = 5.0, *, may_leave_files: bool = False) -> None:
        """No process, no file: the promise after any end (F-06, F-08). Where the kernel ended the last process, its
        files are for the next run to remove."""

        def is_clean() -> bool:
            left = [process for process in self.family if _is_alive(process)]
            return not left and (may_leave_files or not list(self.run_directory.glob("hybrid-serve-*")))

        self.wait(is_clean, seconds)


def read_all(connection: socket.socket) -> list[str]:
    with connection, connection.makefile() as lines:
        return lines.read().split("\n")[:-1]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
