"""S14: an executor in a process of its own, with the fake model, in real servers."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fake_executor import expected
from hybrid_serve.cli.options import parse
from server_process import ServerProcess, read_all


@pytest.mark.parametrize("depth", [1, 2])
def test_a_worker_gives_the_tokens_of_the_model_and_ends_with_its_engine(tmp_path: Path, depth: int) -> None:
    with ServerProcess(tmp_path, f"fake?depth={depth}", load="fake_executor:load_in_worker") as server:
        server.wait_ready(60)
        streams = [server.ask(f"{length} 7 40") for length in (3, 50, 300)]
        for length, stream in zip((3, 50, 300), streams, strict=True):
            assert read_all(stream) == [*map(str, expected(range(length), 7, 40)), "end"]
        server.child("worker of engine").resume()  # it is there
        server.signal(signal.SIGTERM)
        assert server.wait_exit(30) == 0
        server.check_nothing_is_left()
        assert "ERROR" not in server.errors


def test_when_the_engine_is_killed_its_worker_goes_too(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, load="fake_executor:load_in_worker", supervision={"restart_delay": 0.01}) as server:
        server.wait_ready(60)
        worker = server.child("worker of engine")
        server.child("engine").kill()
        worker.wait(10)
        assert read_all(server.ask("3 7 5"))[-1] == "end"


@pytest.mark.parametrize("is_busy", [False, True])
def test_an_engine_whose_worker_is_killed_is_started_again(tmp_path: Path, is_busy: bool) -> None:
    """Also one that sleeps, before a request has to find out."""
    with ServerProcess(
        tmp_path, "fake?delay=0.01", load="fake_executor:load_in_worker", supervision={"restart_delay": 0.01}
    ) as server:
        server.wait_ready(60)
        engine, worker = server.child("engine"), server.child("worker of engine")
        stream = server.open_stream(100) if is_busy else None
        worker.kill()
        engine.wait(10)
        assert f"the worker (pid {worker.pid}) was killed by SIGKILL" in server.errors
        if stream is not None:
            assert read_all(stream) == [*map(str, expected(range(4), 1, 100)), "end"]
        assert read_all(server.ask("3 7 5")) == [*map(str, expected(range(3), 7, 5)), "end"]


def test_a_model_that_fails_in_the_worker_is_the_cause_that_is_told(tmp_path: Path) -> None:
    with ServerProcess(
        tmp_path, "fake?crash_at=3", load="fake_executor:load_in_worker", supervision={"max_restarts": 0}
    ) as server:
        server.wait_ready(60)
        server.ask("4 1 40")
        assert server.wait_exit(30) == 20
        assert "failed: RuntimeError: the fake model fails at step 3" in "\n".join(server.errors.splitlines()[-5:])
        server.check_nothing_is_left()


def test_a_start_that_the_worker_refuses_ends_with_its_box(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "fake?refuse=1", load="fake_executor:load_in_worker") as server:
        assert server.wait_exit(60) == 12
        assert "HS-E999  the fake model refuses" in "\n".join(server.errors.splitlines()[-5:])
        server.check_nothing_is_left()


def test_several_models_may_have_workers() -> None:
    words = ["--models", "f", "--distributed-executor-backend", "mp"]
    assert parse(words, {}).config.parallel.distributed_executor_backend == "mp"
