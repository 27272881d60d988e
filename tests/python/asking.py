"""What a test asks the stand-in API server of a ServerProcess, and what must come of it."""

from __future__ import annotations

import random
import socket
from typing import Any, NamedTuple

import msgspec

from api_child import Ask
from fake_executor import expected
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


def refused(server: ServerProcess) -> list[int]:
    """Peers that the head has refused, and each engine."""
    return [int(count) for count in read_all(server.ask("refused"))[0].split()]


def is_serving(server: ServerProcess, restarts: int) -> bool:
    now = status(server)
    return (now.phase, now.restarts) == ("ready", restarts)


def num_replayed(server: ServerProcess, num_api_servers: int) -> int:
    """By all API servers together: they are asked until each has answered."""
    by_pid: dict[int, int] = {}

    def everyone_answered() -> bool:
        now = status(server)
        by_pid[now.pid] = now.replayed
        assert now.quarantined == 0
        return len(by_pid) == num_api_servers

    server.wait(everyone_answered)
    return sum(by_pid.values())


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
                assert [len(one.top) for one in output.logprobs] == (
                    [width] * len(output.token_ids) if width >= 0 else []
                )
                assert [one.rank for one in output.logprobs] == [
                    token % 5 + 1 for token in output.token_ids[: width + 1]
                ]


def mixed(dice: random.Random, index: int) -> Mixed:
    prompt = [dice.randrange(900) for _ in range(dice.choice((1, 5, 16, 40, 700)))]
    seed, length, n = dice.randrange(2**40), dice.randrange(20, 60), dice.choice((1, 1, 1, 3))
    params: dict[str, Any] = {"seed": seed, "max_tokens": length}
    if index % 4 == 1:
        params["logprobs"] = 0
    if index % 4 == 2:
        params["stop_token_ids"] = (expected(prompt, seed, length)[length // 2],)
    return Mixed(prompt, n, params)


class Engine(NamedTuple):
    """What an API server knows of one."""

    phase: str
    restarts: int
    running: int  # as it says itself
    open: int  # choices of that API server


def engines(server: ServerProcess) -> list[Engine]:
    lines = read_all(server.ask("engines"))
    return [Engine(phase, *map(int, numbers)) for phase, *numbers in map(str.split, lines)]
