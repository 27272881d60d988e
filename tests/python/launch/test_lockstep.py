"""Replicas that must step together: same steps, asleep together, begun anew together (DESIGN 10, S12)."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import zmq

from asking import OFTEN, ask, engines, reply
from engine_harness import wait_until
from fake_executor import expected
from hybrid_serve.parallel.lockstep import Lockstep
from hybrid_serve.sockets import connect_push
from server_process import ServerProcess

OPTIONS: dict[str, Any] = {
    "load": "fake_executor:load_joint",
    "plan_options": {"lockstep": True},
    "supervision": OFTEN,
    "parallel": {"data_parallel_size": 3},
}


def steps(server: ServerProcess, folder: Path) -> list[tuple[int, int]]:
    """(steps of its own, empty ones) of each living engine."""
    found = []
    for index in range(3):
        real, empty = (folder / f"steps-{server.child('engine', index).pid}").read_bytes().split()
        found.append((int(real), int(empty)))
    return found


def test_replicas_take_the_same_steps_while_one_has_work_and_sleep_when_none_has(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, f"fake?delay=0.002&steps={tmp_path}", **OPTIONS) as server:
        server.wait_ready()
        assert reply(ask(server, [1, 2], seed=3, max_tokens=50)).tokens() == expected([1, 2], 3, 50)

        def is_even() -> bool:
            sums = {real + empty for real, empty in steps(server, tmp_path)}
            return len(sums) == 1 and sums.pop() >= 50

        server.wait(is_even)
        (real, empty), *others = sorted(steps(server, tmp_path), reverse=True)
        assert (empty, others) == (0, [(0, real), (0, real)])  # one worked, two kept it company
        before = sum(process.cpu_times().user for process in map(server.child, ["engine"] * 3, range(3)))
        time.sleep(0.5)
        assert sum(process.cpu_times().user for process in map(server.child, ["engine"] * 3, range(3))) - before < 0.2
        streams = [ask(server, [number], seed=3, max_tokens=100) for number in range(12)]
        for number, stream in enumerate(streams):
            assert reply(stream).tokens() == expected([number], 3, 100)
        server.wait(is_even)
        assert all(real > 0 for real, _ in steps(server, tmp_path))


def test_when_a_replica_dies_all_begin_anew_and_no_token_is_lost(tmp_path: Path) -> None:
    """F-09 in lockstep."""
    with ServerProcess(tmp_path, f"fake?delay=0.003&steps={tmp_path}", **OPTIONS) as server:
        server.wait_ready()
        for restarts in (1, 2):
            streams = [ask(server, [number], seed=3, max_tokens=200) for number in range(6)]
            assert all(stream.recv(1, socket.MSG_PEEK) for stream in streams)
            os.kill(server.child("engine", restarts).pid, signal.SIGKILL)
            for number, stream in enumerate(streams):
                assert reply(stream).tokens() == expected([number], 3, 200)
            server.wait(lambda restarts=restarts: [e.restarts for e in engines(server)] == [restarts] * 3)  # type: ignore[misc]
            server.wait(lambda: {engine.phase for engine in engines(server)} == {"ready"})
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        server.check_nothing_is_left()


def test_a_step_begins_when_the_last_one_has_announced_it_and_a_fast_one_may_be_a_step_ahead() -> None:
    with zmq.Context() as context:
        ours = Lockstep(context, ["inproc://ours", "inproc://b", "inproc://c"], 0)
        b, c = (connect_push(context, "inproc://ours") for _ in range(2))
        begun = threading.Event()

        def begin() -> None:
            ours.begin()
            begun.set()

        assert not ours.is_called
        b.send((0).to_bytes(8, "little"))
        wait_until(lambda: ours.is_called)
        thread = threading.Thread(target=begin)
        thread.start()
        assert not begun.wait(0.1)
        b.send((1).to_bytes(8, "little"))  # it does not wait for c, which is still to announce step 0
        assert not begun.wait(0.1)
        c.send((0).to_bytes(8, "little"))
        assert begun.wait(5)
        thread.join()
        assert ours.step == 1
        assert ours.is_called  # to step 1, by b
        context.destroy(linger=0)
