"""Two engines and three API servers over a real model (S8, S12, F-07, F-09)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tiny_models import make_tiny_model

from .server import Server, serving, wait_until

COMPLETIONS = "/v1/completions"
OPTIONS = ("--data-parallel-size", "2", "-asc", "3", "--data-parallel-prefix-affinity", "--served-model-name", "tiny")
RESTARTS = ("--max-restarts", "100", "--restart-delay", "0")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    with serving(str(folder), *OPTIONS, *RESTARTS) as server:
        yield server


def by_engine(server: Server, name: str) -> dict[str, float]:
    """A metric's samples added up for each engine."""
    text = httpx.get(server.url + "/metrics", timeout=30).text
    found: dict[str, float] = {"0": 0.0, "1": 0.0}
    for engine, value in re.findall(rf'^{re.escape(name)}\{{[^}}]*engine="(\d)"[^}}]*\}} (\S+)$', text, re.MULTILINE):
        found[engine] += float(value)
    return found


def body(index: int, **fields: Any) -> dict[str, Any]:
    return {
        "prompt": f"question {index}",
        "max_tokens": 8,
        "temperature": 1,
        "seed": index,
        "ignore_eos": True,
    } | fields


async def ask_all(server: Server, count: int, **fields: Any) -> list[httpx.Response]:
    """So many requests at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        asked = (client.post(server.url + COMPLETIONS, json=body(i, **fields)) for i in range(count))
        return await asyncio.gather(*asked)


def test_300_requests_are_spread_over_the_engines_and_counted_exactly(pair: Server) -> None:
    """S8: whichever API server is asked."""
    before = by_engine(pair, "vllm:generation_tokens_total")
    replies = asyncio.run(ask_all(pair, 300))
    assert {reply.status_code for reply in replies} == {200}

    def is_counted() -> bool:
        after = by_engine(pair, "vllm:generation_tokens_total")
        return sum(after.values()) - sum(before.values()) == 300 * 8

    wait_until(is_counted, "the counts of all API servers")
    assert sum(by_engine(pair, "vllm:request_success_total").values()) == 300
    assert sum(by_engine(pair, "vllm:request_prompt_tokens_count").values()) == 300
    shares = by_engine(pair, "vllm:e2e_request_latency_seconds_count")
    assert min(shares.values()) > 60, shares  # whoever is done sooner gets more


def test_a_burst_of_64_that_run_on_is_halved(pair: Server) -> None:
    """S12: 32 and 32, give or take 4, though each of three API servers gives away a third."""
    name = "vllm:prompt_tokens_total"
    before = by_engine(pair, name)
    replies = asyncio.run(ask_all(pair, 64, max_tokens=400))
    assert {reply.status_code for reply in replies} == {200}
    tokens = sum(reply.json()["usage"]["prompt_tokens"] for reply in replies)
    wait_until(lambda: sum(by_engine(pair, name).values()) - sum(before.values()) == tokens, "the counts of all")
    after = by_engine(pair, name)
    shares = [64 * (after[engine] - before[engine]) / tokens for engine in "01"]
    assert all(28 <= share <= 36 for share in shares), shares


def test_300_connections_are_spread_over_the_api_servers(pair: Server) -> None:
    """S8: most over least is below 2, also when all come at once."""
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", pair.port), timeout=60)) for _ in range(300)
        ]
        for connection in connections:
            connection.sendall(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        for connection in connections:
            assert connection.recv(12) == b"HTTP/1.1 200"
        counts = [num_connections(process) for process in api_servers(pair)]
        assert len(counts) == 3
        assert sum(counts) >= 300
        assert max(counts) < 2 * min(counts), counts


def num_connections(process: psutil.Process) -> int:
    return sum(one.status == psutil.CONN_ESTABLISHED for one in process.net_connections("tcp"))


def test_a_header_names_the_engine_and_one_that_is_not_there_is_refused_with_the_numbers(pair: Server) -> None:
    """S12."""
    before = by_engine(pair, "vllm:request_success_total")
    for _ in range(6):
        reply = httpx.post(pair.url + COMPLETIONS, json=body(1), headers={"X-data-parallel-rank": "1"}, timeout=60)
        assert reply.status_code == 200

    def is_counted() -> bool:
        after = by_engine(pair, "vllm:request_success_total")
        return (after["0"] - before["0"], after["1"] - before["1"]) == (0, 6)

    wait_until(is_counted, "all of them at engine 1")
    for wrong in ("2", "-1", "one", ""):
        reply = httpx.post(pair.url + COMPLETIONS, json=body(1), headers={"X-data-parallel-rank": wrong}, timeout=60)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "x-data-parallel-rank")
        assert "engines 0 to 1" in error["message"]


def test_prompts_with_the_same_beginning_go_to_the_same_engine(pair: Server) -> None:
    """S12, prefix affinity: and find it in its cache."""
    queries, hits = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
    before = by_engine(pair, queries), by_engine(pair, hits)
    with httpx.Client(timeout=60) as client:  # one connection, hence one API server
        for index in range(6):
            prompt = "the same instructions for everybody " * 10 + f"question {index}"
            assert client.post(pair.url + COMPLETIONS, json=body(1, prompt=prompt)).status_code == 200

    def deltas() -> list[tuple[float, float]]:
        after = by_engine(pair, queries), by_engine(pair, hits)
        return sorted((after[0][one] - before[0][one], after[1][one] - before[1][one]) for one in "01")

    wait_until(lambda: deltas()[1][1] > 0, "the engine's word")
    idle, busy = deltas()
    assert idle == (0, 0)
    assert busy[1] > 0.7 * busy[0]


def test_streams_of_a_killed_engine_end_as_if_it_had_lived(pair: Server) -> None:
    """F-09: greedy and sampled, with the real kernels; /ready says which engine is away and stays 200."""

    def texts(disturb: bool) -> list[str]:
        begun = Counter[int]()

        def read(index: int) -> str:
            text, request = "", body(index, max_tokens=200, stream=True, temperature=index % 2)
            with httpx.stream("POST", pair.url + COMPLETIONS, json=request, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
                        begun[index] += 1
            return text

        with ThreadPoolExecutor(16) as pool:
            replies = [pool.submit(read, index) for index in range(16)]
            if disturb:
                wait_until(lambda: len(begun) == 16 and min(begun.values()) > 10, "all streams have begun")
                pair.child("hybrid-serve: engine 1").kill()
                wait_until(lambda: ready(pair)["engines"]["1"] != "ready", "engine 1 is not ready")
                assert ready(pair)["state"] == "ready"
            return [reply.result() for reply in replies]

    undisturbed = texts(disturb=False)
    assert len(set(undisturbed)) > 8
    assert texts(disturb=True) == undisturbed
    wait_until(lambda: ready(pair)["engines"] == {"0": "ready", "1": "ready"}, "engine 1 is back")
    assert by_engine(pair, "hybrid_engine_restarts_total") == {"0": 0, "1": 1}
    assert by_engine(pair, "hybrid_requests_replayed_total")["1"] > 0


def ready(server: Server) -> dict[str, Any]:
    reply = httpx.get(server.url + "/ready", timeout=30)
    assert reply.status_code == 200
    found: dict[str, Any] = reply.json()
    return found


def api_servers(server: Server) -> list[psutil.Process]:
    return [process for process in server.tree() if "hybrid-serve: api" in process.cmdline()[0]]


def api_pids(server: Server) -> list[int]:
    return [process.pid for process in api_servers(server)]


def test_a_killed_api_server_comes_back_while_the_others_serve(pair: Server) -> None:
    """S8, F-07: and the counts go on."""
    counted = sum(by_engine(pair, "vllm:request_success_total").values())
    victim = pair.child("hybrid-serve: api 1")
    victim.kill()
    replies = asyncio.run(ask_all(pair, 30))
    assert {reply.status_code for reply in replies} == {200}
    wait_until(lambda: len(api_pids(pair)) == 3 and victim.pid not in api_pids(pair), "it is back")

    def is_counted() -> bool:
        return sum(by_engine(pair, "vllm:request_success_total").values()) == counted + 30

    wait_until(is_counted, "the counts")


def test_sigterm_ends_all_of_them_in_order(pair: Server) -> None:
    """The last one of this file."""
    family = pair.tree()
    assert len(family) == 6
    pair.process.send_signal(signal.SIGTERM)
    assert pair.process.wait(30) == 0
    wait_until(lambda: not [one for one in family[1:] if one.is_running()], "nothing is left")
