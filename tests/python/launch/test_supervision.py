"""Real processes that die, hang or poison each other: what goes on, what ends, what is told (P1, P2, P13, F-01..F-18)."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from api_child import Ask
from fake_executor import POISON, expected
from hybrid_serve.client import ChoiceOutput
from hybrid_serve.wire import FinishReason, SamplingParams
from server_process import ServerProcess, read_all

OFTEN: dict[str, Any] = {"max_restarts": 100, "restart_delay": 0.0}


class Reply(NamedTuple):
    outputs: list[ChoiceOutput]
    end: str

    def choice(self, index: int) -> list[ChoiceOutput]:
        return [output for output in self.outputs if output.choice == index]

    def tokens(self, index: int = 0) -> list[int]:
        return [token for output in self.choice(index) for token in output.token_ids]


def ask(server: ServerProcess, prompt: list[int], n: int = 1, **params: Any) -> socket.socket:
    line = msgspec.json.encode(Ask(prompt, SamplingParams(**params), n))
    assert b" " not in line
    return server.ask(line.decode())


def reply(connection: socket.socket) -> Reply:
    *lines, end = read_all(connection)
    return Reply([msgspec.json.decode(line, type=ChoiceOutput) for line in lines], end)


class Status(NamedTuple):
    phase: str
    pid: int
    restarts: int
    replayed: int
    quarantined: int
    running: int


def status(server: ServerProcess) -> Status:
    phase, *numbers = read_all(server.ask("status"))[0].split()
    return Status(phase, *map(int, numbers))


def is_serving(server: ServerProcess, restarts: int) -> bool:
    now = status(server)
    return (now.phase, now.restarts) == ("ready", restarts)


class Mixed(NamedTuple):
    """One request of a mix, and what must come of it whatever happens to the engine."""

    prompt: list[int]
    n: int
    params: dict[str, Any]

    def check(self, got: Reply) -> None:
        assert got.end == "end"
        for index in range(self.n):
            outputs, length = got.choice(index), self.params["max_tokens"]
            right = expected(self.prompt, self.params["seed"], length, index)
            finish = FinishReason.LENGTH
            if stops := [at for at, token in enumerate(right) if token in self.params.get("stop_token_ids", ())]:
                length, finish = stops[0] + 1, FinishReason.STOP
            assert got.tokens(index) == right[:length]
            assert [output.finish for output in outputs] == [FinishReason.NONE] * (len(outputs) - 1) + [finish]
            assert all(output.cached_tokens == -1 for output in outputs[1:])
            width = self.params.get("logprobs", -1)
            for output in outputs:
                assert [len(one.top) for one in output.logprobs] == ([width] * len(output.token_ids) if width >= 0 else [])
                assert [one.rank for one in output.logprobs] == [token % 5 + 1 for token in output.token_ids[: width + 1]]


def mixed(dice: random.Random, index: int) -> Mixed:
    prompt = [dice.randrange(900) for _ in range(dice.choice((1, 5, 16, 40, 700)))]
    seed, length, n = dice.randrange(2**40), dice.randrange(20, 60), dice.choice((1, 1, 1, 3))
    params: dict[str, Any] = {"seed": seed, "max_tokens": length}
    if index % 4 == 1:
        params["logprobs"] = 0
    if index % 4 == 2:
        params["stop_token_ids"] = (expected(prompt, seed, length)[length // 2],)
    return Mixed(prompt, n, params)


@pytest.mark.parametrize("depth", [1, 2])
def test_streams_outlive_kill_9_of_the_engine_to_the_last_token(tmp_path: Path, depth: int) -> None:
    """F-01, P1: 32 mixed streams at once, 10 rounds; nothing lost, nothing doubled."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    with ServerProcess(tmp_path, f"fake?delay=0.002&depth={depth}", supervision=OFTEN) as server:
        server.wait_ready()
        for number in range(1, 11):
            requests = [mixed(dice, index) for index in range(32)]
            connections = [ask(server, one.prompt, one.n, **one.params) for one in requests]
            engine = server.child("engine")
            time.sleep(dice.random() * 0.15)  # the point of the kill is what the round is about
            os.kill(engine.pid, signal.SIGKILL)
            for request, connection in zip(requests, connections, strict=True):
                request.check(reply(connection))
            server.wait(lambda number=number: is_serving(server, number))  # type: ignore[misc]
        assert status(server).quarantined == 0
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        server.check_nothing_is_left()
