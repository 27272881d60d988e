"""What is changed while a server runs stays changed, whichever of its processes dies (P19)."""

from __future__ import annotations

import asyncio
import json
import signal
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx

from .server import Server, serving, wait_until
from .test_load import body_of, stream_text

ADMIN = {"x-api-key": "boss"}


def ask(server: Server, path: str) -> bytes:
    """Over a connection of its own, which any API server may take."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path, headers=ADMIN)
    body = connection.getresponse().read()
    connection.close()
    return body


def live(server: Server) -> dict[str, Any]:
    """What every API server says."""
    found = [json.loads(ask(server, "/admin/config")) for _ in range(12)]
    assert all(each == found[0] for each in found), found
    return dict(found[0])


def patch(server: Server, **changes: Any) -> None:
    response = httpx.patch(server.url + "/admin/config", headers=ADMIN, json=changes, timeout=30)
    assert response.status_code == 200, response.text


def running(server: Server) -> float:
    (line,) = [line for line in ask(server, "/metrics").splitlines() if line.startswith(b"vllm:num_requests_running{")]
    return float(line.split()[-1])


def run_streams(server: Server, most: int, change: bool = False) -> list[str]:
    """What four streams say. From the moment on when it is known that ``most`` may run, no more do; with ``change``
    they are told so on the way."""

    async def run() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, headers=ADMIN) as client:
            bodies = [{**body_of(i), "max_tokens": 40} for i in range(4)]
            streams = asyncio.gather(*(stream_text(client, body) for body in bodies))
            is_known = not change
            while not streams.done():
                now = await asyncio.to_thread(running, server)
                if change and now > most:
                    await asyncio.to_thread(patch, server, max_num_seqs=most)
                    change_told.set()
                is_known = is_known or (change_told.is_set() and now <= most)
                assert now <= most or not is_known
                await asyncio.sleep(0.05)
            assert is_known, "the streams ended before anything could be seen"
            return await streams

    change_told = asyncio.Event()
    return asyncio.run(run())


def test_options_changed_while_it_runs_hold_for_all_processes_and_those_that_come_later(
    demo_gguf: Path, tmp_path: Path
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("max_model_len: 512\nmax_num_seqs: 6\napi_server_count: 2\nrestart_delay: 0\nmax_logprobs: 9\n")
    with serving(str(demo_gguf), "--config", str(file), env={"HYBRID_SERVE_ADMIN_API_KEY": "boss"}) as server:
        undisturbed = run_streams(server, 4)
        assert run_streams(server, 2, change=True) == undisturbed, "who has to wait for a while loses nothing"
        patch(server, max_logprobs=3)
        expected = live(server)
        assert (expected["max_num_seqs"], expected["max_logprobs"]) == (2, 3)
        for index in range(2):
            old = server.child(f"hybrid-serve: api {index}")
            old.kill()
            wait_until(lambda old=old: not old.is_running(), "it is gone")  # type: ignore[misc]
            wait_until(server.ready, "the server answers")
        wait_until(lambda: len(server.tree()) == 4, "both are back")
        assert live(server) == expected
        engine = server.child("hybrid-serve: engine")
        engine.kill()
        wait_until(lambda: not engine.is_running(), "it is gone")
        wait_until(lambda: server.ready() and len(server.tree()) == 4, "another engine is ready")
        assert run_streams(server, 2) == undisturbed

        file.write_text(file.read_text().replace("max_num_seqs: 6", "max_num_seqs: 4") + "log_requests: meta\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: b'"max_num_seqs":4' in ask(server, "/admin/config"), "the file is read again")
        assert (live(server)["log_requests"], live(server)["max_logprobs"]) == ("meta", 9)
        file.write_text("max_num_seqs: many\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "all stays as it is" in server.log(), "the bad file is told")
        assert live(server)["max_num_seqs"] == 4
        assert "admin: admin-api-key-1 sets max_num_seqs=2" in server.log()
        assert "SIGHUP sets" in server.log()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.log()
