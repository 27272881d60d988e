"""What a key has used, over all API servers of one server and over their ends (P12)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_harness import CHAT, MESSAGES, Api, says
from fake_engine import FakeEngine
from hybrid_serve import shared_memory
from hybrid_serve.server.key_use import KeyUse
from hybrid_serve.shared_memory import KEY_RECORD_BYTES, MOST_LIMITED_KEYS, SharedMemory

MakeApi = Callable[..., Api]
NUM_SERVERS = 2


@pytest.fixture
def fd() -> Iterator[int]:
    made = shared_memory.make(NUM_SERVERS)
    yield made
    os.close(made)


@pytest.fixture
def memory(fd: int) -> SharedMemory:
    return SharedMemory(fd, NUM_SERVERS)


@pytest.fixture
def servers(make_api: MakeApi, memory: SharedMemory, tmp_path: Path) -> Callable[..., list[Api]]:
    """Two API servers of one server, with one key of these limits."""

    def make(engine: Callable[[], FakeEngine] = lambda: FakeEngine(says("one two")), **limits: int) -> list[Api]:
        file = tmp_path / "keys.yaml"
        file.write_text(json.dumps([{"name": "app", "key": "k", **limits}]))
        file.chmod(0o600)
        return [make_api(engine(), memory=memory, index=i, api_key_file=str(file)) for i in range(NUM_SERVERS)]

    return make


def ask(api: Api, **fields: Any) -> httpx.Response:
    return api.post(CHAT, {"messages": MESSAGES, **fields}, x_api_key="k")


def test_requests_a_minute_are_those_of_all_servers_together(
    servers: Callable[..., list[Api]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("hybrid_serve.server.keys.monotonic", lambda: now)
    one, other = servers(requests_per_minute=4)
    left = [ask(api).headers["x-ratelimit-remaining-requests"] for api in (one, other, other, one)]
    assert left == ["3", "2", "1", "0"]
    assert [ask(api).status_code for api in (one, other)] == [429, 429]
    now += 15.0
    assert [ask(api).status_code for api in (other, one)] == [200, 429]


def test_requests_at_once_are_those_of_all_servers_together(
    servers: Callable[..., list[Api]], memory: SharedMemory
) -> None:
    """And those of a server that died are not counted any more."""

    def blocked() -> FakeEngine:
        engine = FakeEngine(says("one two"))
        engine.gates[1] = asyncio.Event()
        return engine

    one, other = servers(blocked, max_concurrent=2)

    async def open_one(api: Api) -> asyncio.Task[httpx.Response]:
        body, headers = {"messages": MESSAGES, "stream": True}, {"x-api-key": "k"}
        before = len(api.engine.calls)
        task = asyncio.ensure_future(api.client.post(CHAT, json=body, headers=headers))
        while len(api.engine.calls) == before:
            await asyncio.sleep(0)
        return task

    first, second = one.run(open_one(one)), other.run(open_one(other))
    assert [ask(api).json()["error"]["code"] for api in (one, other)] == ["too_many_concurrent_requests"] * 2

    async def end(api: Api, task: asyncio.Task[httpx.Response]) -> int:
        api.engine.gates[1].set()
        return (await task).status_code

    assert one.run(end(one, first)) == 200
    assert ask(one).status_code == 200
    KeyUse(memory, 1)  # the other server is started again
    assert other.run(end(other, second)) == 200
    assert [ask(api).status_code for api in (one, other)] == [200, 200]
    assert sum(map(int, memory.uses[MOST_LIMITED_KEYS * KEY_RECORD_BYTES :])) == 0


def test_tokens_of_prompts_and_replies_are_counted_when_they_are_known(
    servers: Callable[..., list[Api]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("hybrid_serve.server.keys.monotonic", lambda: now)
    one, other = servers(tokens_per_minute=60, requests_per_minute=100)
    used = sum(ask(one).json()["usage"]["total_tokens"] for _ in range(2))
    assert 60 < used < 120, "the second one was let in with what was left, and made a debt"
    refused = ask(other)
    assert refused.status_code == 429
    assert refused.json()["error"]["message"] == "This key has 60 tokens a minute."
    assert int(refused.headers["retry-after"]) == used - 60 + 1
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert refused.headers["x-ratelimit-limit-tokens"] == "60"
    assert refused.headers["x-ratelimit-reset-tokens"] == f"{used}.0s"
    assert refused.headers["x-ratelimit-remaining-requests"] == "98", "a refused request costs nothing"
    now += used - 60 + 1
    assert ask(other).status_code == 200


def test_processes_that_count_at_the_same_time_count_right(fd: int) -> None:
    code = """
import sys
from hybrid_serve.server.key_use import KeyUse
from hybrid_serve.shared_memory import SharedMemory
use = KeyUse(SharedMemory(int(sys.argv[1]), 2), int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
print(sum(use.begin("app", (1000, 0), 0, 5.0)[1] for _ in range(900)))
"""
    command = [sys.executable, "-c", code, str(fd)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [*command, str(index)],
            pass_fds=[fd],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(NUM_SERVERS)
    ]
    for each in running:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in running:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    counted = [int(each.communicate()[0]) for each in running]
    assert sum(counted) == 1000
    assert KeyUse(SharedMemory(fd, NUM_SERVERS), 1).look("app", (1000, 0), 5.0).num_running == counted[0]


def test_a_table_that_is_full_takes_back_what_nobody_needs(memory: SharedMemory) -> None:
    """Names that come and go with the key file; one that runs or owes keeps its record."""
    use = KeyUse(memory, 0)
    use.begin("runs", (0, 0), 5, 0.0)
    use.spend("owes", (10, 10), 1000, 0.0)
    for number in range(MOST_LIMITED_KEYS - 2):
        use.begin(f"name-{number}", (10, 0), 0, 0.0)
        use.end(f"name-{number}", 0.0)
    digests = {bytes(memory.uses[i * KEY_RECORD_BYTES :][:16]) for i in range(MOST_LIMITED_KEYS)}
    assert len(digests) == MOST_LIMITED_KEYS
    assert bytes(16) not in digests
    for number in range(100):
        assert use.begin(f"new-{number}", (10, 0), 0, 61.0)[1]
        assert use.look(f"new-{number}", (10, 0), 61.0).requests_left == 9
    assert use.look("runs", (0, 0), 61.0).num_running == 1
    assert use.look("owes", (10, 10), 61.0).tokens_left < -900


def test_a_limit_that_is_new_begins_full_and_one_that_is_lowered_holds_at_once(memory: SharedMemory) -> None:
    use = KeyUse(memory, 0)
    use.begin("app", (0, 0), 5, 0.0)
    assert use.look("app", (10, 20), 1.0).requests_left == 10
    use.begin("app", (10, 20), 5, 1.0)
    assert use.look("app", (10, 20), 1.0).requests_left == 9
    assert use.look("app", (3, 20), 1.0).requests_left == 3
    assert use.look("app", (10, 20), 1.0).num_running == 2
