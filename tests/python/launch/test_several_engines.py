"""Real processes, several engines: how they share the work, and what happens when one dies (S8, S12, F-03, F-09)."""

from __future__ import annotations

import os
import random
import signal
import socket
from pathlib import Path
from typing import Any

import psutil

from asking import OFTEN, ask, engines, mixed, num_replayed, reply, status
from fake_executor import expected
from server_process import ServerProcess

TWO: dict[str, Any] = {"data_parallel_size": 2}


def test_a_burst_is_shared_equally(tmp_path: Path) -> None:
    """S12: 64 requests, 32 +- 4 each."""
    with ServerProcess(tmp_path, "fake?delay=0.005", parallel=TWO, api_server_count=2) as server:
        server.wait_ready()
        connections = [ask(server, [1, 2, 3], seed=index, max_tokens=3000) for index in range(64)]
        assert all(connection.recv(1, socket.MSG_PEEK) for connection in connections)
        by_api: dict[int, list[int]] = {}

        def everyone_answered() -> bool:
            by_api[status(server).pid] = [engine.running for engine in engines(server)]
            return len(by_api) == 2 and all(sum(running) == 64 for running in by_api.values())

        server.wait(everyone_answered)
        for running in by_api.values():
            assert all(28 <= number <= 36 for number in running)
        server.signal(signal.SIGINT)
        server.signal(signal.SIGINT)
        server.wait_exit()


def test_streams_of_an_engine_that_dies_are_finished_by_the_other_at_once(tmp_path: Path) -> None:
    """F-09: 32 mixed streams, token for token, long before the engine is back; the server is ready throughout."""
    marker = tmp_path / "slow from now on"
    dice = random.Random(9)
    model = f"fake?delay=0.01&slow_load_if={marker}"  # so that many still run when it dies, on a busy machine too
    with ServerProcess(tmp_path, model, parallel=TWO, api_server_count=2, supervision=OFTEN) as server:
        server.wait_ready()
        marker.touch()
        requests = [mixed(dice, index) for index in range(32)]
        connections = [ask(server, one.prompt, one.n, **one.params) for one in requests]
        assert connections[-1].recv(1, socket.MSG_PEEK)
        os.kill(server.child("engine", 1).pid, signal.SIGKILL)
        for request, connection in zip(requests, connections, strict=True):
            request.check(reply(connection))
        now = engines(server)
        assert [engine.phase for engine in now] == ["ready", "loading_weights"] or now[1].phase == "restarting"
        assert now[1].restarts == 1
        assert status(server).phase == "ready"
        assert num_replayed(server, 2) >= 8
        later = ask(server, [5], seed=1, max_tokens=5)
        assert reply(later).tokens() == expected([5], 1, 5)


def test_an_engine_that_comes_back_takes_its_share_again(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "fake?delay=0.002", parallel=TWO, supervision=OFTEN) as server:
        server.wait_ready()
        for restarts in ([1, 0], [1, 1], [2, 1]):
            victim = 0 if restarts != [1, 1] else 1
            os.kill(server.child("engine", victim).pid, signal.SIGKILL)

            def is_back(restarts: list[int] = restarts) -> bool:
                assert status(server).phase == "ready"
                now = engines(server)
                return [engine.restarts for engine in now] == restarts and {engine.phase for engine in now} == {"ready"}

            server.wait(is_back)
        streams = [ask(server, [1], seed=1, max_tokens=3000) for _ in range(20)]
        assert all(stream.recv(1, socket.MSG_PEEK) for stream in streams)
        assert [engine.open for engine in engines(server)] == [10, 10]
        server.signal(signal.SIGINT)
        server.signal(signal.SIGINT)
        server.wait_exit()


def test_when_both_engines_die_the_streams_wait_and_lose_nothing(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "fake?delay=0.002", parallel=TWO, supervision=OFTEN) as server:
        server.wait_ready()
        requests = [mixed(random.Random(index), index) for index in range(16)]
        connections = [ask(server, one.prompt, one.n, **one.params) for one in requests]
        assert connections[-1].recv(1, socket.MSG_PEEK)
        for pid in [server.child("engine", index).pid for index in (0, 1)]:
            os.kill(pid, signal.SIGKILL)
        for request, connection in zip(requests, connections, strict=True):
            request.check(reply(connection))


def test_an_engine_that_dies_too_often_is_left_out_and_the_last_one_ends_the_server(tmp_path: Path) -> None:
    """F-03: exit code 20 only when nobody is left who could serve."""
    supervision = {"max_restarts": 0}
    with ServerProcess(tmp_path, "fake?delay=0.002", parallel=TWO, supervision=supervision) as server:
        server.wait_ready()
        stream = ask(server, [1, 2], seed=3, max_tokens=600)
        assert stream.recv(1, socket.MSG_PEEK)
        os.kill(server.child("engine", 0).pid, signal.SIGKILL)
        server.wait(lambda: [engine.phase for engine in engines(server)] == ["dead", "ready"])
        assert reply(stream).tokens() == expected([1, 2], 3, 600)
        assert "it is left out, the other engines go on" in server.errors
        last = ask(server, [1, 2], seed=3, max_tokens=4000)
        assert last.recv(1, socket.MSG_PEEK)
        os.kill(server.child("engine", 1).pid, signal.SIGKILL)
        assert reply(last).end == "error: engine_dead"
        assert server.wait_exit() == 20
        server.check_nothing_is_left()


def test_a_hung_engine_gives_its_requests_to_the_other(tmp_path: Path) -> None:
    """F-04 with two: nothing new goes to one that is silent; at the limit what it had is moved."""
    supervision = OFTEN | {"engine_heartbeat_timeout": 2.0}
    with ServerProcess(tmp_path, "fake?delay=0.003", parallel=TWO, supervision=supervision) as server:
        server.wait_ready()
        streams = [ask(server, [1, number], seed=3, max_tokens=300) for number in range(4)]
        assert all(stream.recv(1, socket.MSG_PEEK) for stream in streams)
        server.child("engine", 0).suspend()
        server.wait(lambda: engines(server)[0].phase == "not_responding")
        assert status(server).phase == "ready"
        late = [ask(server, [7, number], seed=3, max_tokens=20) for number in range(4)]
        for number, stream in enumerate(late):
            assert reply(stream).tokens() == expected([7, number], 3, 20)
        for number, stream in enumerate(streams):
            assert reply(stream).tokens() == expected([1, number], 3, 300)
        assert "engine 0 (pid" in server.errors


def test_every_socket_of_several_engines_is_in_the_private_directory(tmp_path: Path) -> None:
    """ADV-02: what listens is the HTTP port on loopback, and unix sockets in a directory of mode 0700."""
    with ServerProcess(tmp_path, parallel=TWO, api_server_count=2) as server:
        server.wait_ready()
        listening = [
            connection.laddr
            for process in [psutil.Process(server.process.pid), *server.family]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert {address[0] for address in listening} == {"127.0.0.1"}
        assert {address[1] for address in listening} == {server.address[1]}
        directory = next(tmp_path.glob("hybrid-serve-*"))
        assert directory.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in directory.glob("engine-?")} == {"engine-0", "engine-1"}


def test_one_engine_that_cannot_start_ends_the_start(tmp_path: Path) -> None:
    """S9, S10: with its own box; nobody waits for the other."""
    with ServerProcess(tmp_path, f"fake?refuse_after={tmp_path / 'loaded'}", parallel=TWO) as server:
        assert server.wait_exit() == 12
        assert "the fake model refuses" in server.errors
        assert "ready in" not in server.output
        server.check_nothing_is_left()
