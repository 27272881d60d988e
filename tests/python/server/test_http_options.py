"""CORS, custom middleware, the unix socket, slow readers (S16, S18, ADV-44, F-39)."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvloop
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_harness import CHAT, MESSAGES, Api
from engine_harness import until
from fake_engine import FakeEngine
from hybrid_serve.config import ServerConfig
from hybrid_serve.errors import StartupError
from hybrid_serve.launch.listener import listen
from hybrid_serve.server.connection import BoundedProtocol
from hybrid_serve.server.process import http_server
from raw_http import request, response_of, served

MakeApi = Callable[..., Api]
PAGE = "https://page.example"


def preflight(api: Api, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization",
    }
    return api.run(api.client.request("OPTIONS", CHAT, headers=headers))


def test_a_listed_page_may_call_and_no_other(make_api: MakeApi) -> None:
    """S18: a preflight has no key and needs none; what follows it does, and the page can read the refusal."""
    api = make_api(allowed_origins=(PAGE,), api_key=("k",))
    allowed = preflight(api, PAGE)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "access-control-allow-credentials" not in allowed.headers
    assert preflight(api, "https://other.example").status_code == 400
    assert "access-control-allow-origin" not in preflight(api, "https://other.example").headers
    refused = api.post(CHAT, {"messages": MESSAGES}, origin=PAGE)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    answer = api.post(CHAT, {"messages": MESSAGES}, origin=PAGE, x_api_key="k")
    assert answer.status_code == 200
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    other = api.post(CHAT, {"messages": MESSAGES}, origin="https://other.example", x_api_key="k")
    assert "access-control-allow-origin" not in other.headers


def test_methods_headers_and_cookies_of_pages_are_what_is_configured(make_api: MakeApi) -> None:
    api = make_api(
        allowed_origins=(PAGE,), allowed_methods=("GET",), allowed_headers=("x-mine",), allow_credentials=True
    )
    response = preflight(api, PAGE, "GET")
    assert response.status_code == 400, "authorization is not a header of the list"
    assert response.headers["access-control-allow-credentials"] == "true"
    assert response.headers["access-control-allow-methods"] == "GET"


def test_no_page_may_call_by_default(api: Api) -> None:
    """ADV-44"""
    assert not [name for name in preflight(api, PAGE).headers if name.startswith("access-control")]


class Marks:
    """A user's middleware: marks what it saw, and refuses one header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (b"x-bad", b"1") in scope["headers"]:
            raise RuntimeError("secret text of the middleware")

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-marked", b"yes")]
            await send(message)

        await self.app(scope, receive, marked)


def test_a_users_middleware_sees_every_request_and_its_faults_have_our_shape(
    make_api: MakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S16"""
    module = types.ModuleType("users_module")
    module.Marks = Marks  # type: ignore[attr-defined]
    module.number = 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_module", module)
    api = make_api(middleware=("users_module.Marks",), api_key=("k",))
    assert api.get("/live").headers["x-marked"] == "yes"
    body = json.dumps({"messages": MESSAGES, "stream": True}).encode()
    assert api.post(CHAT, body, x_api_key="k").headers["x-marked"] == "yes"
    broken = api.get("/live", x_bad="1")
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in broken.text
    for name, why in (("users_module.number", "it is a int"), ("no_such.Thing", "ModuleNotFound"), ("Bare", "Empty")):
        with pytest.raises(StartupError) as caught:
            make_api(middleware=(name,))
        assert caught.value.failure.code == "HS-E043"
        assert why in caught.value.failure.why


def test_request_ids_can_be_kept_out_of_the_headers(make_api: MakeApi) -> None:
    response = make_api(enable_request_id_headers=False).post(CHAT, {}, x_request_id="mine")
    assert "x-request-id" not in response.headers
    assert response.json()["error"]["request_id"] == "mine"


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_unix_socket_serves_without_a_host_check(
    make_api: MakeApi, tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """No page of a browser reaches a file of this user."""
    path = str(tmp_path / "s")
    api = make_api(uds=path)
    api.loop.close()
    api.loop = new_loop()

    async def scenario() -> None:
        with listen(ServerConfig(uds=path)) as listener:
            server = http_server(api.context)
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            transport = httpx.AsyncHTTPTransport(uds=path)
            async with httpx.AsyncClient(transport=transport, base_url="http://any.name") as client:
                assert (await client.post(CHAT, json={"messages": MESSAGES})).status_code == 200
            server.should_exit = True
            await serving

    api.run(scenario())


def test_a_client_that_reads_nothing_loses_its_place(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is aborted, and others are served meanwhile."""
    monkeypatch.setattr(BoundedProtocol, "write_seconds", 0.3)
    engine = FakeEngine(lambda call, choice: [5] * 10**6)
    api = make_api(engine)

    async def scenario() -> None:
        async with served(api, send_buffer=8192) as connect:
            _, writer = await connect()
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            body = {"messages": MESSAGES, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 8}
            writer.write(request(json.dumps(body).encode()))
            while not engine.calls or not engine.calls[0].left:
                other_reader, other = await connect()
                other.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await response_of(other_reader))[0] == 200
                await asyncio.sleep(0.05)
            assert engine.calls[0].unfinished_when_left > 0
            await until(lambda: api.context.lifecycle.num_open == 0)  # the rest of its task is some turns away

    api.run(scenario())
