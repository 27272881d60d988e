"""Several models in one server: real API servers, keepers and engines of the fake model (P9)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from fake_executor import expected
from server_process import ServerProcess
from tiny_models import write_tokenizer

PATIENCE = 60.0  # seconds: a model's engine starts in less than one, on a machine with nothing else to do
ADMIN = {"authorization": "Bearer admin"}
KEY = {"authorization": "Bearer key"}
_MAIN = """
import sys
sys.path[:] = {path!r}
import msgspec
from hybrid_serve.config import Config
from hybrid_serve.launch import several
from hybrid_serve.served import ServedModel
config = msgspec.convert({front!r}, Config)
models = [
    ServedModel(name=each.pop("name"), first_engine=index, memory=each.pop("memory", 0),
                at_start=each.pop("at_start", False), config=msgspec.convert({config!r} | each, Config))
    for index, each in enumerate({models!r})
]
raise SystemExit(several.serve(config, models, load="fake_executor:load"))
"""


class Several(ServerProcess):
    """A server of several fake models, and what clients ask it."""

    def __init__(
        self, directory: Path, models: dict[str, str], *, routing: dict[str, Any], own: dict[str, Any], **server: Any
    ) -> None:
        """``models``: name -> the fake model; ``own``: name -> keys of its ``ServedModel``."""
        super().__init__(directory)
        write_tokenizer(directory)
        config = {
            "server": {"port": 0, "api_key": ["key"], "admin_api_key": ["admin"], "shutdown_timeout": 20.0, **server},
            "supervision": {"flight_recorder_dir": str(self.recordings), "max_restarts": 100, "restart_delay": 0.0},
            "scheduler": {"max_num_seqs": 16},
        }
        served = [
            {"name": name, "model": {"model": model, "tokenizer": str(directory), "served_model_name": [name]}}
            | own.get(name, {})
            for name, model in models.items()
        ]
        front = config | {"routing": {"models": "models.yaml", **routing}}
        self._code = _MAIN.format(path=sys.path, front=front, config=config, models=served)

    @property
    def client(self) -> httpx.Client:
        host, port = self.address
        return httpx.Client(base_url=f"http://{host}:{port}", timeout=PATIENCE, headers=KEY)

    def __enter__(self) -> Several:
        super().__enter__()
        return self

    def complete(self, model: str, prompt: list[int], count: int = 8, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": count, "seed": 5, "ignore_eos": True}
        with self.client as client:
            return client.post("/v1/completions", json=body | {"return_token_ids": True} | fields)

    def check(self, model: str, prompt: list[int], count: int = 8) -> None:
        """The reply is the one that the model gives alone."""
        response = self.complete(model, prompt, count)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == model
        assert response.json()["choices"][0]["token_ids"] == expected(prompt, 5, count)

    def states(self) -> dict[str, str]:
        with self.client as client:
            return {card["id"]: card["state"] for card in client.get("/v1/models").json()["data"]}

    def order(self, model: str, what: str) -> httpx.Response:
        with self.client as client:
            return client.post(f"/v1/models/{model}/{what}", headers=ADMIN)

    def metric(self, name: str, model: str) -> float:
        with self.client as client:
            lines = client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"{name}{{") and f'model_name="{model}"' in line]
        return sum(float(line.split()[-1]) for line in found)


@contextmanager
def several(
    directory: Path,
    models: dict[str, str],
    routing: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
    **server: Any,
) -> Iterator[Several]:
    with Several(directory, models, routing=routing or {"max_loaded_models": 2}, own=own or {}, **server) as running:
        running.wait_ready(PATIENCE)
        yield running
        if running.process.poll() is None:
            running.signal(signal.SIGTERM)
        assert running.wait_exit(PATIENCE) == 0
        running.check_nothing_is_left(PATIENCE)


THREE = {"a": "fake", "b": "fake", "c": "fake"}


def test_the_model_unused_for_longest_makes_room_and_every_request_is_answered(tmp_path: Path) -> None:
    """P9: three models with a budget for two; one at a time, then all at once, through two API servers."""
    with several(tmp_path, THREE, api_server_count=2) as server:
        assert server.states() == dict.fromkeys("abc", "unloaded")
        assert "model name: a, b, c" in server.output
        server.check("a", [1, 2])
        server.check("b", [3, 4])
        server.check("a", [5])
        server.check("c", [6])
        assert server.states() == {"a": "ready", "b": "unloaded", "c": "ready"}
        with ThreadPoolExecutor(12) as pool:
            for done in [pool.submit(server.check, "abc"[i % 3], [i, 7], 20) for i in range(24)]:
                done.result()
        assert sorted(server.states().values()) == ["ready", "ready", "unloaded"]
        server.wait(lambda: sum(server.metric("vllm:generation_tokens_total", name) for name in "abc") == 512, PATIENCE)
        unknown = server.complete("d", [1])
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert unknown.json()["error"]["message"] == "The model 'd' does not exist. Served here: a, b, c."
        server.wait(lambda: not any(server.metric("hybrid_open_requests", name) for name in "abc"), PATIENCE)


def test_a_model_is_put_away_when_its_requests_have_ended_and_those_that_come_meanwhile_wait(tmp_path: Path) -> None:
    """P9, F-12: unload under load, and a model that must go while it serves: no request fails, before SIGTERM comes."""
    models = {"a": "fake?delay=0.02", "b": "fake"}
    own = {"a": {"at_start": True}}
    with several(tmp_path, models, {"max_loaded_models": 1}, own) as server, ThreadPoolExecutor(8) as pool:
        assert "load     a ok" in server.output
        running = begin(pool, server, "a", 100)
        unload = pool.submit(server.order, "a", "unload")
        server.wait(lambda: server.states()["a"] == "draining", PATIENCE)
        late = pool.submit(server.check, "a", [9])
        running.result()
        assert unload.result().status_code == 200
        late.result()  # it asked for the model again
        running = begin(pool, server, "a", 100)
        server.check("b", [2])
        assert running.done(), "a was put away under its request"
        running.result()
        assert server.states() == {"a": "unloaded", "b": "ready"}
        with server.client as client:
            assert client.post("/v1/models/a/load").status_code == 403
        assert server.order("a", "load").json()["state"] == "ready"
        running = begin(pool, server, "a", 100)
        waiting = pool.submit(server.complete, "b", [1])
        server.wait(lambda: server.states()["a"] == "draining", PATIENCE)
        server.signal(signal.SIGTERM)
        assert waiting.result().json()["error"]["code"] == "draining"
        running.result()
        assert server.wait_exit(PATIENCE) == 0


def begin(pool: ThreadPoolExecutor, server: Several, model: str, count: int) -> Future[None]:
    """A request that has certainly begun."""
    before = server.metric("vllm:generation_tokens_total", model)
    running = pool.submit(server.check, model, [1], count)
    server.wait(lambda: server.metric("vllm:generation_tokens_total", model) > before, PATIENCE)
    return running


def test_a_model_that_cannot_be_loaded_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    """P9: also where it was to be loaded at the start; it is tried again when an admin says so."""
    marker = tmp_path / "marker"
    marker.touch()
    models = {"good": "fake?load=2", "bad": f"fake?refuse_after={marker}"}
    own: dict[str, Any] = {"bad": {"at_start": True}, "good": {"scheduler": {"max_num_queued_reqs": 2}}}
    with several(tmp_path, models, own=own) as server, ThreadPoolExecutor(5) as pool:
        assert "load     bad failed: the fake model refuses: it was told to" in server.output
        refused = server.complete("bad", [1])
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["hs_code"]) == (503, "model_failed", "HS-E158")
        assert error["message"] == "The model 'bad' could not be loaded: the fake model refuses: it was told to"
        assert refused.headers["retry-after"] == "30"
        with server.client as client:  # to what it is already: a model's own limit stays
            client.patch("/admin/config", headers=ADMIN, json={"max_num_queued_reqs": 1024}).raise_for_status()
        sent = [pool.submit(server.complete, "good", [1]) for _ in range(5)]  # more than may wait
        assert sorted(each.result().status_code for each in sent) == [200, 200, 503, 503, 503]
        assert server.metric("vllm:admission_rejections_total", "good") == 3
        assert server.states() == {"good": "ready", "bad": "failed"}
        assert server.metric("hybrid_ready", "bad") == 0
        assert server.metric("hybrid_ready", "good") == 1
        with server.client as client:
            ready = client.get("/ready")
        assert (ready.status_code, ready.json()["state"]) == (200, "ready")
        marker.unlink()
        assert server.order("bad", "load").json()["state"] == "ready"
        server.check("bad", [2])


def test_an_engine_or_its_keeper_that_is_killed_is_started_again_and_the_others_go_on(tmp_path: Path) -> None:
    """P9, P1: streams of the dead one go on token for token; those of the other do not notice."""
    models = {"a": "fake?delay=0.01", "b": "fake?delay=0.01"}
    own: dict[str, Any] = {name: {"at_start": True} for name in models}
    with several(tmp_path, models, own=own) as server, ThreadPoolExecutor(8) as pool:
        before = server.child("engine", 1).pid
        for victim in ("engine", "model"):
            running = [begin(pool, server, name, 200) for name in ("b", "a")]  # a's, which must not be over, last
            server.child(victim, 0).send_signal(signal.SIGKILL)
            for each in running:
                each.result()
        assert server.metric("hybrid_engine_restarts_total", "a") == 2
        assert server.metric("hybrid_requests_replayed_total", "a") == 2
        assert server.metric("hybrid_engine_restarts_total", "b") == 0
        assert server.child("engine", 1).pid == before
        assert server.states() == {"a": "ready", "b": "ready"}


def test_an_api_server_that_is_killed_keeps_no_model_in_memory_and_the_supervisor_no_process(tmp_path: Path) -> None:
    """F-08, P4, P9."""
    models = {"a": "fake?delay=0.01", "b": "fake"}
    with Several(tmp_path, models, routing={"max_loaded_models": 1}, own={}) as server:
        server.wait_ready(PATIENCE)
        with ThreadPoolExecutor(1) as pool:
            running = begin(pool, server, "a", 3000)
            server.child("api").send_signal(signal.SIGKILL)
            assert isinstance(running.exception(PATIENCE), httpx.TransportError)
        server.wait(lambda: answers(server), PATIENCE)
        server.check("b", [1])
        assert isinstance(server.child("model", 1), psutil.Process)
        server.process.kill()
        server.wait_exit()
        server.check_nothing_is_left(PATIENCE)


def answers(server: Several) -> bool:
    try:
        return bool(server.states())
    except httpx.TransportError:
        return False
