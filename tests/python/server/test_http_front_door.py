"""What every request passes: ids, keys, hosts, media types, sizes; and the small routes (S19, S20, S28, F-27, F-31)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from api_harness import CHAT, MESSAGES, Api, routes, says
from fake_engine import FACTS, FakeEngine
from hybrid_serve.server.app import POST_ROUTES
from hybrid_serve.wire import Status

MakeApi = Callable[..., Api]


def send(api: Api, method: str, path: str, headers: list[tuple[str, str]] | None = None) -> httpx.Response:
    content = b"{}" if method == "POST" else b""
    sent = [("content-type", "application/json"), *(headers or [])]
    return api.run(api.client.request(method, path, content=content, headers=sent))


def test_host_must_name_this_machine_where_no_key_guards_it(make_api: MakeApi) -> None:
    """ADV-44: a page whose name was made to resolve to 127.0.0.1"""
    api = make_api()
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "127.5.5.5", "[::1]:8000", "LOCALHOST"):
        assert send(api, "GET", "/v1/models", [("host", host)]).status_code == 200, host
    for host in (
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "[",
    ):
        response = send(api, "GET", "/v1/models", [("host", host)])
        assert response.status_code == 403, host
        assert response.json()["error"]["code"] == "host_not_allowed"
    keyed = make_api(api_key=("k",))
    assert send(keyed, "GET", "/v1/models", [("host", "api.example"), ("x-api-key", "k")]).status_code == 200
    opened = make_api(host="0.0.0.0", insecure_no_auth=True)
    assert send(opened, "GET", "/v1/models", [("host", "api.example")]).status_code == 200


def test_request_id_is_the_clients_if_sane_else_a_new_one(api: Api) -> None:
    """S20: the same in the header, the id of the answer and in errors."""
    response = api.post(CHAT, {"messages": MESSAGES}, x_request_id="abc-1")
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "chatcmpl-abc-1"
    error = api.post(CHAT, {}, x_request_id="abc-2")
    assert error.json()["error"]["request_id"] == error.headers["x-request-id"] == "abc-2"
    for bad in ("x" * 129, "a b", "a\tb", ""):
        new = api.get("/live", x_request_id=bad).headers["x-request-id"]
        assert new != bad
        assert len(new) == 32
    assert api.get("/live").headers["x-request-id"] != api.get("/live").headers["x-request-id"]


@pytest.mark.parametrize("path", [route.path for route in POST_ROUTES])
def test_every_post_route_has_the_same_limits(make_api: MakeApi, path: str) -> None:
    """ADV-37, ADV-44, F-27"""
    api = make_api(max_request_bytes=1000)

    def refused(content: Any, headers: dict[str, str]) -> tuple[int, str]:
        response = api.run(api.client.post(path, content=content, headers=headers))
        return response.status_code, response.json()["error"]["code"]

    body = json.dumps({"unused": "x" * 2000}).encode()
    as_json = {"content-type": "application/json; charset=utf-8"}

    async def in_pieces() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    assert refused(body, as_json) == (413, "request_too_large")
    assert refused(in_pieces(), as_json) == (413, "request_too_large")
    assert refused(body[:1000], as_json) == (400, "invalid_json")
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert refused(b"{}", {"content-type": media_type}) == (415, "unsupported_media_type")
    assert refused(b"{}", as_json | {"content-encoding": "gzip"}) == (415, "unsupported_media_type")
    assert api.get(path).status_code == 405
    assert api.get(path).json()["error"]["code"] == "method_not_allowed"


def test_small_routes_answer(api: Api) -> None:
    assert api.get("/live").json() == {"status": "alive"}
    assert api.get("/ready").json()["state"] == "ready"
    assert api.get("/health").status_code == 200
    assert api.get("/version").json()["version"]
    assert api.get("/").json()["chat"] == CHAT
    assert api.get("/nope").json()["error"]["code"] == "not_found"
    card = api.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == ("demo", "model", 256)
    assert api.get("/v1/models/demo").json() == card


def test_routes_work_behind_a_prefix(make_api: MakeApi) -> None:
    """S16: the server puts the prefix into scope["root_path"] and before the path."""
    api = make_api(api_key=("k",))
    transport = httpx.ASGITransport(api.app, root_path="/llm")

    async def get(path: str, key: str) -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get(path, headers={"x-api-key": key})).status_code

    assert api.run(get("/llm/live", "")) == 200
    assert api.run(get("/llm/v1/models", "")) == 401
    assert api.run(get("/llm/v1/models", "k")) == 200


def test_while_the_model_loads_it_is_alive_but_not_ready(make_api: MakeApi) -> None:
    """S28, P20: a quarter took 1.5 s."""
    engine = FakeEngine(says("x"), status=Status("loading_weights", 0.25, "shard 1 of 4", 1.5), facts=None)
    api = make_api(engine)
    assert api.get("/live").status_code == 200
    for path in ("/ready", "/health"):
        response = api.get(path)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert response.json() == {
            "state": "loading_weights", "progress": 0.25, "message": "shard 1 of 4", "seconds": 1.5,
            "eta_s": 4.5, "engines": {"0": "loading_weights"},
        }  # fmt: skip
    assert engine.calls == [], "P2: a probe is no request"
    response = api.post(CHAT, {"messages": MESSAGES})
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.json()["error"]["code"] == "model_loading"
    assert api.get("/v1/models").json()["data"][0]["max_model_len"] is None
    engine.status, engine.facts = Status("ready", 1.0), FACTS
    api.context.lifecycle.text_is_loaded = False
    assert (api.get("/ready").json()["state"], api.get("/ready").json()["eta_s"]) == ("starting", None)
    api.context.lifecycle.text_is_loaded = True
    api.chat()
    engine.status = Status("dead")
    response = api.post(CHAT, {"messages": MESSAGES})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    assert api.get("/ready").status_code == 503


def test_openapi_describes_every_route_and_field(api: Api) -> None:
    """S17"""
    document = api.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    described = {path.replace("{id}", "demo") for path in document["paths"]}
    assert described == {path for _, path in routes(api)} - {"/", "/openapi.json", "/docs", "/ping"}
    schemas = document["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]
    assert chat["required"] == ["messages"]
    assert chat["properties"]["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": 2.0}
    assert {"top_k", "min_p", "cache_salt", "return_token_ids", "stop_token_ids"} <= set(chat["properties"])

    assert set(document["paths"]["/admin/config"]) == {"get", "patch"}
    assert schemas["ConfigChanges"]["properties"]["max_num_queued_reqs"] == {"type": "integer"}

    def check(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].removeprefix("#/components/schemas/") in schemas
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)

    check(document)


def test_the_page_of_the_routes_is_whole_without_a_network_and_can_be_left_out(make_api: MakeApi) -> None:
    """S17"""
    api = make_api(api_key=("k",))
    assert api.get("/docs").status_code == 401
    response = api.get("/docs", x_api_key="k")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    text = response.text
    assert re.findall(r"(?:src|href)=\"?([^\">]*)", text) == ["openapi.json"], "relative, and nothing is loaded"
    assert "<script" not in text
    for path, methods in api.get("/openapi.json", x_api_key="k").json()["paths"].items():
        assert all(f"<code>{method.upper()} {path}</code>" in text for method in methods)
    assert "<code>temperature</code><td>number from 0.0 to 2.0 or null<td>1.0" in text
    assert "<code>messages</code><td>array of Message<td>required" in text
    without = make_api(disable_docs=True)
    assert [without.get(path).status_code for path in ("/docs", "/openapi.json")] == [404, 404]


def test_importing_the_application_imports_no_torch() -> None:
    code = (
        "import hybrid_serve.server.process, sys;"
        "print([name for name in ('torch', 'transformers', 'hybrid_serve._core') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
