"""Real processes that die, hang or are poisoned: what goes on, what ends, what is told (P1, P2, F-01..F-07, F-14)."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

import pytest

from asking import OFTEN, Reply, ask, is_serving, mixed, num_replayed, reply, status
from fake_executor import POISON, expected
from server_process import ServerProcess, read_all


@pytest.mark.parametrize(("depth", "num_api_servers"), [(1, 1), (2, 2)])
def test_streams_outlive_kill_9_of_the_engine_to_the_last_token(
    tmp_path: Path, depth: int, num_api_servers: int
) -> None:
    """F-01, P1: 32 mixed streams at once, 10 rounds; nothing lost, nothing doubled."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    model = f"fake?delay=0.002&depth={depth}"
    with ServerProcess(tmp_path, model, supervision=OFTEN, api_server_count=num_api_servers) as server:
        server.wait_ready()
        for number in range(1, 11):
            requests = [mixed(dice, index) for index in range(32)]
            connections = [ask(server, one.prompt, one.n, **one.params) for one in requests]
            engine = server.child("engine")
            # The point of the kill is what the round is about; on a busy machine many would be before the first token.
            if number % 2:
                select.select(connections, [], [], 30)
            time.sleep(dice.random() * 0.15)
            os.kill(engine.pid, signal.SIGKILL)
            for request, connection in zip(requests, connections, strict=True):
                request.check(reply(connection))
            server.wait(lambda number=number: is_serving(server, number))  # type: ignore[misc]
        assert num_replayed(server, num_api_servers) > 40  # the rounds did cut streams
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        server.check_nothing_is_left()


def test_a_request_that_kills_the_engine_twice_ends_alone_and_those_that_waited_are_not_blamed(tmp_path: Path) -> None:
    """F-02, P11: 500 ``request_quarantined``; the 16 that ran with it and the 16 that waited get their whole text."""
    model, scheduler = "fake?delay=0.002&poison_length=12", {"max_num_seqs": 16}
    with ServerProcess(tmp_path, model, supervision=OFTEN, scheduler=scheduler) as server:
        server.wait_ready()
        dice = random.Random(1)
        requests = [mixed(dice, index) for index in range(32)]
        connections = [ask(server, one.prompt, one.n, **one.params) for one in requests[:8]]
        poison = ask(server, [POISON, 1, 2, 3], seed=5, max_tokens=50)
        connections += [ask(server, one.prompt, one.n, **one.params) for one in requests[8:]]
        died = reply(poison)
        assert died.end == "error: request_quarantined"
        # It died of the 12th token; the step before may have died with it on its way out.
        assert died.tokens() == expected([POISON, 1, 2, 3], 5, 8)[: len(died.tokens())]
        assert len(died.tokens()) >= 6
        for request, connection in zip(requests, connections, strict=True):
            request.check(reply(connection))
        now = status(server)
        assert (now.restarts, now.quarantined) == (2, 1)


def test_a_prompt_that_kills_the_engine_before_its_first_token_is_found_too(tmp_path: Path) -> None:
    """F-02: all choices of it, also where none of them has begun."""
    with ServerProcess(tmp_path, "fake?poison_length=600", supervision=OFTEN) as server:
        server.wait_ready()
        died = reply(ask(server, [POISON] * 800, 3, seed=5, max_tokens=50))
        assert died == Reply([], "error: request_quarantined")
        server.wait(lambda: is_serving(server, 2))
        assert reply(ask(server, [1], seed=1, max_tokens=3)).tokens() == expected([1], 1, 3)


def test_an_engine_that_dies_too_often_ends_the_server_with_the_cause_in_the_last_box(tmp_path: Path) -> None:
    """F-03, P1: exit code 20, not 0; streams end with an error."""
    supervision = {"max_restarts": 2, "restart_delay": 0.1}
    with ServerProcess(tmp_path, "fake?crash_at=20", supervision=supervision) as server:
        server.wait_ready()
        lines = read_all(server.ask("4 1 4000"))
        assert lines[:-1] == [str(token) for token in expected(range(4), 1, len(lines) - 1)]
        assert len(lines) > 40  # three engines took part
        assert lines[-1].startswith("error: EngineDead: engine 0 failed, after 2 restarts")
        assert server.wait_exit() == 20
        server.check_nothing_is_left()
        box = server.errors.splitlines()[-5:]
        assert box[0] == box[-1]
        assert "engine 0 failed, after 2 restarts within 300 s" in box[1]
        assert "RuntimeError: the fake model fails at step 20" in box[2]
        assert "Traceback" in server.errors
        assert [found[1] for found in re.finditer(r"it is started again (now|in 0.1 s)", server.errors)] == [
            "now",
            "in 0.1 s",
        ]


def test_an_engine_that_cannot_start_again_is_not_tried_for_ever(tmp_path: Path) -> None:
    """F-03: the first start succeeds, every later one is refused; the refusal is the cause that is told."""
    marker = tmp_path / "loaded"
    supervision = {"max_restarts": 2, "restart_delay": 0.05}
    with ServerProcess(tmp_path, f"fake?refuse_after={marker}", supervision=supervision) as server:
        server.wait_ready()
        stream = server.open_stream()
        os.kill(server.child("engine").pid, signal.SIGKILL)
        assert server.wait_exit() == 20
        assert read_all(stream)[-1].startswith("error: EngineDead")
        assert "HS-E999  the fake model refuses, after 2 restarts" in server.errors.splitlines()[-4]
        assert "it was killed by SIGKILL" in server.errors
        server.check_nothing_is_left()


def test_a_stopped_engine_is_seen_at_once_and_may_come_back_before_the_limit(tmp_path: Path) -> None:
    """F-04: not ready meanwhile; no restart, no token lost."""
    with ServerProcess(tmp_path, "fake?delay=0.005", supervision={"engine_heartbeat_timeout": 6.0}) as server:
        server.wait_ready()
        stream = ask(server, [1, 2], seed=3, max_tokens=600)
        engine = server.child("engine")
        engine.suspend()
        server.wait(lambda: status(server).phase == "not_responding")
        engine.resume()
        server.wait(lambda: is_serving(server, 0))
        assert reply(stream).tokens() == expected([1, 2], 3, 600)
        assert server.child("engine").pid == engine.pid


@pytest.mark.parametrize("is_busy", [True, False])
def test_an_engine_that_stays_stopped_is_killed_and_replaced(tmp_path: Path, is_busy: bool) -> None:
    """F-04, P2: under load and idle; its stacks are in the log."""
    with ServerProcess(tmp_path, "fake?delay=0.005", supervision={"engine_heartbeat_timeout": 1.0}) as server:
        server.wait_ready()
        stream = ask(server, [1, 2], seed=3, max_tokens=300 if is_busy else 1)
        if is_busy:
            assert stream.recv(1, socket.MSG_PEEK)
        else:
            server.wait(lambda: status(server).running == 0)
        began, engine = time.monotonic(), server.child("engine")
        engine.suspend()
        server.wait(lambda: status(server).phase != "ready")
        assert time.monotonic() - began < 5
        server.wait(lambda: is_serving(server, 1))
        assert server.child("engine").pid != engine.pid
        assert reply(stream).tokens() == expected([1, 2], 3, 300 if is_busy else 1)
        assert f"engine 0 (pid {engine.pid}) hung: no sign of life for 1." in server.errors
        assert re.search(r'File ".*/engine/loop.py", line \d+ in run$', server.errors, re.MULTILINE)


def test_a_long_step_within_its_limit_is_busy_and_not_hung(tmp_path: Path) -> None:
    """F-05, P2: it takes three times the heartbeat's limit, and the server stays ready throughout."""
    model, supervision = "fake?slow_at=10&slow=3", {"engine_heartbeat_timeout": 1.0, "engine_iteration_timeout": 30.0}
    with ServerProcess(tmp_path, model, supervision=supervision) as server:
        server.wait_ready()
        stream = ask(server, [1, 2], seed=3, max_tokens=30)
        seen: set[str] = set()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                seen.add(status(server).phase)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert reply(stream).tokens() == expected([1, 2], 3, 30)
        done.set()
        watcher.join()
        assert seen == {"ready"}
        assert status(server).restarts == 0


def test_a_step_beyond_its_limit_is_ended_with_stacks_and_the_batchs_numbers(tmp_path: Path) -> None:
    """P2: it hangs again, and the hang is the cause in the last box."""
    supervision = {"engine_heartbeat_timeout": 1.0, "engine_iteration_timeout": 1.0, "max_restarts": 1}
    with ServerProcess(tmp_path, "fake?slow_at=10&slow=60", supervision=supervision) as server:
        server.wait_ready()
        stream = ask(server, [1, 2], seed=3, max_tokens=30)
        assert reply(stream).end == "error: engine_dead"
        assert server.wait_exit() == 20
        assert "in submit" in server.errors
        assert "its last batch: BatchHeader(step=10, num_seqs=1, num_tokens=1" in server.errors
        assert "HS-E203" in server.errors.splitlines()[-4]
        assert "its step has taken" in server.errors.splitlines()[-3]
        server.check_nothing_is_left()


def test_a_dead_api_server_is_replaced_and_its_requests_end_while_the_others_serve(tmp_path: Path) -> None:
    """F-07: its clients see the connection close; the engine has its blocks back; the other's stream goes on."""
    with ServerProcess(tmp_path, "fake?delay=0.002", api_server_count=2) as server:
        server.wait_ready()
        streams: dict[int, TextIO] = {}  # one of each API server
        num_asked: Counter[int] = Counter()
        while len(streams) < 2:
            lines = server.ask("pid 4 1 2000").makefile()
            pid = int(lines.readline())
            streams[pid] = lines
            num_asked[pid] += 1
        victim, other = server.child("api", 0), server.child("api", 1)
        assert set(streams) == {victim.pid, other.pid}
        server.wait(lambda: status(server).running >= 2)
        os.kill(victim.pid, signal.SIGKILL)
        assert "end" not in streams[victim.pid].read()
        server.wait(lambda: 0 < status(server).running <= num_asked[other.pid])
        assert streams[other.pid].read().split() == [*map(str, expected(range(4), 1, 2000)), "end"]
        again = server.child("api", 0)
        assert again.pid != victim.pid
        server.wait(lambda: status(server).pid == again.pid)
        assert "api 0 (pid" in server.errors
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        server.check_nothing_is_left()


def test_sigterm_while_the_engine_restarts_lets_the_streams_finish(tmp_path: Path) -> None:
    """F-12, F-14: exit code 0, whole text."""
    with ServerProcess(tmp_path, "fake?delay=0.002", supervision=OFTEN) as server:
        server.wait_ready()
        stream = ask(server, [1, 2], seed=3, max_tokens=200)
        assert stream.recv(1, socket.MSG_PEEK)
        os.kill(server.child("engine").pid, signal.SIGKILL)
        server.wait(lambda: status(server).restarts == 1)
        server.signal(signal.SIGTERM)
        assert reply(stream).tokens() == expected([1, 2], 3, 200)
        assert server.wait_exit() == 0
        server.check_nothing_is_left()


def test_sigterm_while_the_engine_restarts_and_nobody_waits_ends_at_once(tmp_path: Path) -> None:
    """F-14: within 2 s, although loading takes longer."""
    with ServerProcess(tmp_path, f"fake?slow_load_after={tmp_path / 'loaded'}", supervision=OFTEN) as server:
        server.wait_ready()
        os.kill(server.child("engine").pid, signal.SIGKILL)
        server.wait(lambda: status(server).phase == "loading_weights")
        server.signal(signal.SIGTERM)
        assert server.wait_exit(2) == 0
        server.check_nothing_is_left()


def test_sigterm_under_load_cuts_no_stream(tmp_path: Path) -> None:
    """F-12: 3 rounds with 2 API servers and 32 mixed streams; exit code 0, nothing left."""
    dice = random.Random(2)
    for number in range(3):
        directory = tmp_path / str(number)
        directory.mkdir()
        with ServerProcess(directory, "fake?delay=0.002", api_server_count=2, shutdown_timeout=20.0) as server:
            server.wait_ready()
            requests = [mixed(dice, index) for index in range(32)]
            connections = [ask(server, one.prompt, one.n, **one.params) for one in requests]
            for connection in connections:  # accepted: what still waits in the listening socket would be refused
                assert connection.recv(1, socket.MSG_PEEK)
            server.signal(signal.SIGTERM)
            for request, connection in zip(requests, connections, strict=True):
                request.check(reply(connection))
            assert server.wait_exit() == 0
            server.check_nothing_is_left()
            assert server.errors == ""


@pytest.mark.parametrize("victim", ["engine", "api"])
def test_sigterm_at_any_point_of_a_restart_ends_the_server_in_order(tmp_path: Path, victim: str) -> None:
    """F-14: exit code 0 and nothing left, however far the new process has come."""
    for pause in (0.02, 0.2, 0.4):  # its interpreter starts, it imports, it says hello
        directory = tmp_path / str(pause)
        directory.mkdir()
        with ServerProcess(directory, "fake", supervision=OFTEN, api_server_count=2) as server:
            server.wait_ready()
            os.kill(server.child(victim).pid, signal.SIGKILL)
            time.sleep(pause)
            server.remember_family()
            server.signal(signal.SIGTERM)
            assert server.wait_exit(4) == 0
            server.check_nothing_is_left()
