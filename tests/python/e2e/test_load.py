"""Many clients at once on the real model (S45, B2, B11, F-39)."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx

from .server import Server, wait_until


async def stream_text(client: httpx.AsyncClient, body: dict[str, Any], arrivals: list[float] | None = None) -> str:
    pieces = []
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            if arrivals is not None:
                arrivals.append(time.monotonic())
            pieces += [choice["text"] for choice in event["choices"]]
    return "".join(pieces)


def body_of(i: int) -> dict[str, Any]:
    return {
        "prompt": f"Lesson {i}. The number {i * 37} is interesting because " + "of this and that, " * (i % 9),
        "max_tokens": 16 + i % 17,
        "temperature": 0.8 if i % 2 else 0.0,
        "seed": i,
        "ignore_eos": True,
    }


def test_64_streams_at_once_each_say_what_they_say_alone(server: Server) -> None:
    async def run() -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            together = await asyncio.gather(*(stream_text(client, body_of(i)) for i in range(64)))
            alone = [await stream_text(client, body_of(i)) for i in range(0, 64, 4)]
        assert together[::4] == alone
        assert all(together)

    asyncio.run(run())


def test_a_long_prompt_does_not_stop_the_streams_that_decode(server: Server) -> None:
    """B2: chunked prefill; each stream gets tokens between the long prompt's arrival and its first token."""

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            arrivals: list[list[float]] = [[] for _ in range(8)]
            streams = [
                asyncio.create_task(stream_text(client, {**body_of(i), "max_tokens": 400}, arrivals[i]))
                for i in range(8)
            ]
            while not all(len(times) > 3 for times in arrivals):
                assert not any(stream.done() for stream in streams), "a stream ended before all had begun"
                await asyncio.sleep(0.005)
            sent = time.monotonic()
            first: list[float] = []
            await stream_text(client, {"prompt": list(range(100, 1900)), "max_tokens": 1, "temperature": 0}, first)
            during = [sum(sent < t < first[0] for t in times) for times in arrivals]
            await asyncio.gather(*streams)
        assert min(during) >= 2, during

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_request_streaming_or_not(server: Server) -> None:
    """F-39, B11: aborted within 200 ms; the poll's own period and /metrics add to the bound that is asserted."""
    wait_until(lambda: server.metric("vllm:num_requests_running") == 0, "the server is idle")
    for stream in (True, False):
        body = {**body_of(1), "max_tokens": 1500, "stream": stream}

        async def leave(body: dict[str, Any] = body) -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                request = asyncio.create_task(client.post("/v1/completions", json=body))
                await asyncio.to_thread(
                    wait_until, lambda: server.metric("vllm:num_requests_running") == 1, "the request runs"
                )
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)

        asyncio.run(leave())
        left = time.monotonic()
        wait_until(lambda: server.metric("vllm:num_requests_running") == 0, "the request is gone", timeout=5)
        assert time.monotonic() - left < 1.0, f"stream={stream}"
