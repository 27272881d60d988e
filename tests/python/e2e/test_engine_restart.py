"""The engine dies under the real model: clients of the HTTP server see a pause, and nothing else (P1, F-01)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .server import Server, serving, wait_until

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 60, "ignore_eos": True},
    {"prompt": "The sea is", "temperature": 1.0, "seed": 7, "max_tokens": 60, "n": 3, "ignore_eos": True},
    {"prompt": "One, two, three", "temperature": 0.8, "seed": 8, "max_tokens": 60, "logprobs": 2, "ignore_eos": True},
    {
        "prompt": "A list of words: red, blue, red, blue, red, blue,",
        "temperature": 0.9,
        "seed": 9,
        "max_tokens": 60,
        "min_tokens": 50,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "logit_bias": {"338": 2.0},
    },
    {"prompt": ["Dear John,", "Dear Mary,"], "temperature": 1.0, "seed": 10, "max_tokens": 60, "stop": [" the", "\n"]},
]


@pytest.fixture(scope="module")
def mortal(demo_gguf: Path) -> Iterator[Server]:
    with serving(str(demo_gguf), "--max-model-len", "1024", "--restart-delay", "0") as server:
        yield server


class Client:
    """Reads one stream in a thread; ``begun`` after some tokens."""

    def __init__(self, server: Server, body: dict[str, Any], begins_after: int) -> None:
        self._url, self._body = server.url + "/v1/completions", body
        self._begins_after = begins_after
        self.begun = threading.Event()

    def read(self) -> list[dict[str, Any]]:
        body = self._body | {"stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", self._url, json=body, timeout=60) as response:
            assert response.status_code == 200, response.read()
            lines = [line[6:] for line in self._lines(response) if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def _lines(self, response: httpx.Response) -> Iterator[str]:
        for number, line in enumerate(response.iter_lines()):
            if number >= self._begins_after:
                self.begun.set()
            yield line
        self.begun.set()


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream: per choice text, log-probabilities and end; and the usage."""
    choices: dict[int, dict[str, Any]] = {}
    usage: dict[str, int] = {}
    for event in events:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            mine = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "ends": []})
            mine["text"] += choice["text"]
            if choice.get("logprobs"):
                mine["logprobs"] += choice["logprobs"]["token_logprobs"]
            if choice["finish_reason"]:
                mine["ends"].append(choice["finish_reason"])
    return {"choices": choices, "usage": {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}}


def run(server: Server, begins_after: int = 0, *, disturb: bool = False) -> list[dict[str, Any]]:
    clients = [Client(server, body, begins_after) for body in REQUESTS]
    with ThreadPoolExecutor(len(clients)) as pool:
        replies = [pool.submit(client.read) for client in clients]
        if disturb:
            for client in clients:
                assert client.begun.wait(60)
            server.child("hybrid-serve: engine").kill()
            wait_until(lambda: httpx.get(server.url + "/ready").status_code == 503, "/ready says it restarts")
            assert httpx.get(server.url + "/live").status_code == 200
            refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] in ("engine_restarting", "model_loading")
            assert int(refused.headers["retry-after"]) >= 1
        return [summary(reply.result()) for reply in replies]


def test_kill_9_of_the_engine_changes_no_reply(mortal: Server) -> None:
    """Penalties, biases, n > 1, several prompts, stop strings, log-probabilities and usage as if nothing happened; new
    requests are told when to come back."""
    undisturbed = run(mortal)
    assert run(mortal, begins_after=20, disturb=True) == undisturbed
    wait_until(mortal.ready, "the engine serves again")
    assert mortal.metric("hybrid_engine_restarts_total") == 1
    assert mortal.metric("hybrid_requests_replayed_total") >= 3  # those that nothing can end before their length
    assert mortal.metric("hybrid_requests_quarantined_total") == 0


def test_kill_9_of_the_only_api_server_brings_another(mortal: Server) -> None:
    """The loaded model stays: only the HTTP side is started again, and goes on counting (P22)."""
    api, engine = mortal.child("hybrid-serve: api"), mortal.child("hybrid-serve: engine")
    names = ("hybrid_engine_restarts_total", "hybrid_requests_replayed_total", "vllm:generation_tokens_total")
    counted = [mortal.metric(name) for name in names]
    api.kill()
    wait_until(lambda: not api.is_running() and mortal.ready(), "another API server is ready")
    assert mortal.child("hybrid-serve: engine").pid == engine.pid
    assert [mortal.metric(name) for name in names] == counted
    reply = httpx.post(mortal.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=30)
    assert reply.status_code == 200
