"""Real processes, started and signalled: how a server begins and ends (F-03, F-08, F-12..F-15, F-56)."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from fake_executor import expected
from server_process import ServerProcess, read_all


def test_a_server_starts_answers_and_drains_on_sigterm(tmp_path: Path) -> None:
    """F-12: a stream that was open when SIGTERM came ends complete; exit code 0."""
    with ServerProcess(tmp_path, "fake?delay=0.01") as server:
        server.wait_ready()
        assert read_all(server.ask("3 7 5")) == [*map(str, expected([0, 1, 2], 7, 5)), "end"]
        running = server.open_stream(60)
        server.signal(signal.SIGTERM)
        rest = read_all(running)
        assert (rest[-1], len(rest)) == ("end", 61)
        assert server.wait_exit() == 0
        server.check_nothing_is_left()
        assert server.errors == ""
        phases = [line.split()[1] for line in server.output.splitlines() if line.startswith("[")]
        assert phases == ["config", "load", "memory", "server"]


def test_when_the_supervisor_is_killed_everything_is_gone_within_5_seconds(tmp_path: Path) -> None:
    """F-08, P4: no process, no file, and the port is free."""
    with ServerProcess(tmp_path, "fake?delay=0.01", api_server_count=2) as server:
        server.wait_ready()
        server.open_stream()
        address = server.address
        server.process.kill()
        assert server.wait_exit() == -signal.SIGKILL
        server.check_nothing_is_left(5)
        server.wait(lambda: can_bind(address), 5)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"model": "fake?refuse=1"}, 12, "HS-E999  the fake model refuses"),
        ({"load": "no_such_module:load"}, 20, "ModuleNotFoundError"),
        ({"api_entry": "api_child:refuse"}, 20, "the stand-in fails as it was told to"),
    ],
)
def test_a_child_that_cannot_start_ends_the_start_with_its_own_box(
    tmp_path: Path, options: dict[str, Any], code: int, words: str
) -> None:
    with ServerProcess(tmp_path, **options) as server:
        assert server.wait_exit() == code
        last = server.errors.splitlines()
        assert last[-1].startswith("-----")
        assert words in "\n".join(last[-5:])
        assert last[-5] == last[-1]
        assert "ready in" not in server.output
        server.check_nothing_is_left()


def test_a_busy_port_is_told_before_anything_is_loaded_with_the_process_that_holds_it(tmp_path: Path) -> None:
    """F-56: exit code 13. Of another server it is the supervisor, although its children hold the socket, too."""
    directory = tmp_path / "second"
    directory.mkdir()
    with ServerProcess(tmp_path) as holder:
        holder.wait_ready()
        port = holder.address[1]
        with ServerProcess(directory, port=port) as server:
            assert server.wait_exit() == 13
            assert f"HS-E031  port {port} is in use" in server.errors
            assert f"pid {holder.process.pid} (" in server.errors
            server.check_nothing_is_left()


def test_sigterm_while_the_model_loads_ends_it_within_2_seconds(tmp_path: Path) -> None:
    """F-14: exit code 143."""
    with ServerProcess(tmp_path, "fake?load=30") as server:
        server.wait(lambda: "is bound" in server.output)
        assert read_all(server.ask("status"))[0].split()[0] in ("starting", "loading_weights")
        server.remember_family()
        server.signal(signal.SIGTERM)
        assert server.wait_exit(2) == 143
        server.check_nothing_is_left()


def test_a_second_signal_does_not_wait_for_streams(tmp_path: Path) -> None:
    """F-12, F-15."""
    with ServerProcess(tmp_path, "fake?delay=0.02", shutdown_timeout=60.0) as server:
        server.wait_ready()
        server.open_stream()
        server.signal(signal.SIGINT)
        server.wait(lambda: "stopping" in server.output)
        server.signal(signal.SIGINT)
        assert server.wait_exit(3) == 130
        server.check_nothing_is_left()


def test_a_stream_longer_than_the_limit_does_not_hold_the_drain(tmp_path: Path) -> None:
    """F-13: exit code 0 at the limit."""
    with ServerProcess(tmp_path, "fake?delay=0.02", shutdown_timeout=0.3) as server:
        server.wait_ready()
        server.open_stream()
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait_exit(4) == 0
        assert time.monotonic() - began < 3
        server.check_nothing_is_left()


def test_a_server_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    """F-15: ``serve | head``; here the reader is gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    port = free_port()
    with ServerProcess(tmp_path, output_fd=write, port=port) as server:
        os.close(write)
        server.wait(lambda: not can_bind(("127.0.0.1", port)))
        server.wait(lambda: read_all(server.ask("status", port))[0].startswith("ready"))
        assert read_all(server.ask("1 1 1", port)) == [str(expected([0], 1, 1)[0]), "end"]
        server.remember_family()
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert server.errors == ""


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    stale = tmp_path / "hybrid-serve-stale"
    stale.mkdir(mode=0o700)
    (stale / "lock").touch()
    with ServerProcess(tmp_path) as server:
        server.wait_ready()
        found = [path.name for path in tmp_path.glob("hybrid-serve-*")]
        assert len(found) == 1
        assert found != ["hybrid-serve-stale"]
        assert (tmp_path / found[0]).stat().st_mode & 0o777 == 0o700
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        server.check_nothing_is_left()


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port: int = any_port.getsockname()[1]
        return port


def can_bind(address: tuple[str, int]) -> bool:
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            again.bind(address)
        except OSError:
            return False
        return True
