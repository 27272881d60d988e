"""Engines on the two nodes of a Ray cluster (S13, F-11, ADV-02, ADV-43): one cluster, one server, in this order."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ray_cluster import RayCluster
from tiny_models import make_tiny_model

from .server import Server, command, free_port, serving, wait_until

pytestmark = pytest.mark.timeout(400)
NUM_STREAMS = 8
RAY = ("--distributed-executor-backend", "ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as running:
        yield running


@pytest.fixture(scope="module")
def server(model: Path, cluster: RayCluster) -> Iterator[Server]:
    options = ("-dp", "2", "--data-parallel-rpc-port", str(free_port()), "--max-restarts", "1")
    with serving(str(model), *RAY, *options, env=cluster.environment, patience=200) as running:
        yield running


def texts(
    server: Server, disturb: Callable[[], None] | None = None, is_noticed: Callable[[], bool] = lambda: True
) -> list[str]:
    """What so many streams give, greedy and sampled. With ``disturb``, which is called when all have begun, each is
    asked for again and again until ``is_noticed``, so that what is lost had some of them; all give the same."""
    begun = Counter[int]()
    enough = threading.Event()

    def read(index: int) -> str:
        text = ""
        request: dict[str, Any] = {"prompt": f"question {index}", "max_tokens": 300, "ignore_eos": True}
        request |= {"seed": index, "temperature": index % 2, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=request, timeout=200) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    begun[index] += 1
        return text

    def read_until_enough(index: int) -> str:
        found = {read(index)}
        while not enough.is_set():
            found.add(read(index))
        assert len(found) == 1
        return found.pop()

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        try:
            replies = [pool.submit(read_until_enough, index) for index in range(NUM_STREAMS)]
            if disturb is not None:
                wait_until(lambda: len(begun) == NUM_STREAMS, "all streams have begun")
                disturb()
                wait_until(is_noticed, "the loss is known", 60)
        finally:
            enough.set()
        return [reply.result() for reply in replies]


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    return texts(server)


def phases(server: Server) -> dict[str, str]:
    reply = httpx.get(server.url + "/ready", timeout=30)
    assert reply.status_code == 200
    found: dict[str, str] = reply.json()["engines"]
    return found


def engines(cluster: RayCluster) -> dict[str, psutil.Process]:
    """By rank."""
    found = cluster.processes("hybrid-serve: engine")
    return {process.cmdline()[0].split()[-1]: process for process in found}


def actor_of(engine: psutil.Process) -> psutil.Process:
    """It started the node's supervisor, which started the engine."""
    return engine.parents()[1]


def test_each_node_has_an_engine_and_what_listens_is_on_loopback(cluster: RayCluster, server: Server) -> None:
    """S13, ADV-02: of ours; Ray's own sockets ask for the token."""
    by_rank = engines(cluster)
    assert by_rank.keys() == {"0", "1"}
    assert "NodeActor" in actor_of(by_rank["0"]).cmdline()[0]
    assert by_rank["0"].parents()[2] != by_rank["1"].parents()[2]  # the node's own process
    ours = [*server.tree(), *cluster.processes("hybrid-serve: ")]
    with_ray = server.child("hybrid-serve: ray")
    listening = {
        connection.laddr[0]
        for process in ours
        if process != with_ray
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    for rank in ("0", "1"):
        headers = {"X-data-parallel-rank": rank}
        reply = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=headers)
        assert reply.status_code == 200


def test_when_a_node_is_removed_streams_go_on_and_its_engine_is_started_on_another(
    cluster: RayCluster, server: Server, undisturbed: list[str]
) -> None:
    """F-11: token for token, and the server is ready throughout."""
    before = engines(cluster)
    num_restarts = partial(server.metric, "hybrid_engine_restarts_total")
    assert texts(server, cluster.remove_worker, lambda: num_restarts() == 1) == undisturbed
    wait_until(lambda: set(phases(server).values()) == {"ready"}, "the engine is back", 150)
    after = engines(cluster)
    lost = [rank for rank in before if before[rank] != after[rank]]
    assert len(lost) == 1
    assert not before[lost[0]].is_running()
    assert after["0"].parents()[2] == after["1"].parents()[2]
    assert server.metric("hybrid_requests_replayed_total") > 0


def test_an_engine_whose_actor_dies_too_often_is_left_out_and_the_other_serves_on(
    cluster: RayCluster, server: Server, undisturbed: list[str]
) -> None:
    """F-03, F-11: the removed node counts as the one restart that it has."""
    lost = next(rank for rank in ("0", "1") if server.log().count(f"engine {rank} is started again") == 1)
    victim = engines(cluster)[lost]
    assert texts(server, actor_of(victim).kill, lambda: phases(server)[lost] == "dead") == undisturbed
    wait_until(lambda: not victim.is_running(), "its process is gone")
    assert "it is left out" in server.log()


def test_a_killed_server_leaves_no_engine_behind(cluster: RayCluster, server: Server) -> None:
    """S11, F-08."""
    left = [*server.tree(), *cluster.processes("hybrid-serve: "), *cluster.processes("NodeActor")]
    assert len(left) >= 6
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(process.is_running() for process in left[1:]), "nothing of it is left")


def test_streams_of_the_only_engine_wait_for_the_next_and_a_stop_is_no_loss(
    model: Path, cluster: RayCluster, undisturbed: list[str]
) -> None:
    """F-11, F-12: exit code 0, and nothing is started again."""
    port = ("--data-parallel-rpc-port", str(free_port()))
    with serving(str(model), *RAY, *port, env=cluster.environment, patience=200) as server:
        victim = actor_of(engines(cluster)["0"])
        assert texts(server, victim.kill, lambda: "is started again" in server.log()) == undisturbed
        server.process.terminate()
        assert server.process.wait(60) == 0
        assert server.log().count("is started again") == 1
    wait_until(lambda: not cluster.processes("hybrid-serve: "), "nothing of it is left")


def test_a_cluster_without_token_is_refused() -> None:
    """ADV-43."""
    with RayCluster(has_token=False, has_worker=False) as cluster:
        done = subprocess.run(
            command("serve", "--port", "0", *RAY, "--data-parallel-rpc-port", str(free_port())),
            env={**os.environ, **cluster.environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2, done.stderr
    assert "HS-E047" in done.stderr
    assert "--insecure-ray" in done.stderr
