"""API keys: default deny, scopes, limits, the key file and its reload (S19, P12, F-31, ADV-41, ADV-42)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_harness import CHAT, COMPLETIONS, MESSAGES, PUBLIC, Api, routes, says
from fake_engine import FakeEngine
from hybrid_serve.errors import StartupError
from hybrid_serve.server import file_watch
from hybrid_serve.server.access import PUBLIC_PATHS
from hybrid_serve.server.file_watch import watch
from hybrid_serve.server.keys import read_key_file
from hybrid_serve.server.process import watched_files

MakeApi = Callable[..., Api]


def send(api: Api, method: str, path: str, *headers: tuple[str, str], key: str = "") -> httpx.Response:
    sent = [("content-type", "application/json"), *headers, *([("x-api-key", key)] if key else [])]
    return api.run(api.client.request(method, path, content=b"" if method == "GET" else b"{}", headers=sent))


def key_file(directory: Path, *entries: dict[str, Any]) -> str:
    path = directory / "keys.yaml"
    path.write_text(json.dumps(entries))
    path.chmod(0o600)
    return str(path)


def test_every_route_but_the_health_ones_needs_a_key(make_api: MakeApi) -> None:
    """S19, ADV-42: whatever the method, whatever Host says."""
    api = make_api(api_key=("secret",), admin_api_key=("boss",))
    assert PUBLIC_PATHS == PUBLIC
    assert len(routes(api)) >= 15
    unknown = [("GET", "/no/such/route"), ("DELETE", "/v1/models"), ("OPTIONS", CHAT), ("TRACE", "/metrics")]
    for method, path in [*routes(api), *unknown]:
        for host in ("localhost", "127.0.0.1/live", "evil.example", "localhost:8000@evil.example", "/live", "a\\live?"):
            response = send(api, method, path, ("host", host))
            if path in PUBLIC:
                assert response.status_code == 200
                continue
            assert response.status_code == 401, (method, path, host)
            error = response.json()["error"]
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
            assert response.headers["www-authenticate"] == "Bearer"


def test_every_key_opens_in_either_header(make_api: MakeApi) -> None:
    api = make_api(api_key=("first", "second"), admin_api_key=("third",))
    for key in ("first", "second", "third"):
        for header in (("authorization", f"Bearer {key}"), ("authorization", f"bearer {key}"), ("x-api-key", key)):
            assert send(api, "GET", "/v1/models", header).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer")],
        [("authorization", "")],
        [("authorization", "secret")],
        [("authorization", "Basic secret")],
        [("authorization", "Bearer secretx")],
        [("authorization", "Bearer " + "x" * 10**6)],
        [("authorization", "Bearer secret"), ("authorization", "Bearer secret")],
        [("x-api-key", "secret"), ("x-api-key", "secret")],
        [("x-api-key", "")],
        [("x-api-key", "s\xe9cret")],
    ],
)
def test_other_credentials_get_the_same_401(make_api: MakeApi, headers: list[tuple[str, str]]) -> None:
    """F-31"""
    api = make_api(api_key=("secret",))
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    response = api.run(api.client.request("GET", "/v1/models?api_key=secret", headers=raw))
    body = response.json()["error"]
    assert response.status_code == 401
    assert body["message"] == "A valid API key is needed: Authorization: Bearer KEY."


def test_keys_are_compared_as_digests_in_constant_time(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """ADV-41: all keys every time, whichever matched."""
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    api = make_api(api_key=("first", "second", "third"))
    assert send(api, "GET", "/v1/models", key="first").status_code == 200
    assert len(compared) == 3
    assert all(len(a) == len(b) == 32 for a, b in compared)


ENTRIES: list[dict[str, Any]] = [
    {"name": "app", "key": "app-key"},
    {"name": "hashed", "sha256": hashlib.sha256(b"hashed-key").hexdigest(), "scopes": ["infer", "metrics"]},
    {"name": "prometheus", "key": "scrape-key", "scopes": ["metrics"]},
    {"name": "ops", "key": "ops-key", "scopes": ["admin"]},
]


def test_a_key_opens_what_its_scopes_say_and_nothing_else(make_api: MakeApi, tmp_path: Path) -> None:
    api = make_api(api_key=("plain",), admin_api_key=("boss",), api_key_file=key_file(tmp_path, *ENTRIES))
    expected = {
        "app-key": (200, 403, 403), "hashed-key": (200, 200, 403), "scrape-key": (403, 200, 403),
        "ops-key": (403, 403, 200), "plain": (200, 200, 403), "boss": (200, 200, 200), "app": (401, 401, 401),
    }  # fmt: skip
    for key, statuses in expected.items():
        found = tuple(
            send(api, "GET", path, key=key).status_code for path in ("/v1/models", "/metrics", "/admin/config")
        )
        assert found == statuses, key
    error = send(api, "GET", "/admin/config", key="plain").json()["error"]
    assert (error["code"], error["message"]) == ("insufficient_scope", "This route needs a key with the scope 'admin'.")


def test_a_key_may_be_for_some_of_the_models(make_api: MakeApi, tmp_path: Path) -> None:
    """P12: the others do not exist for it, and are not listed."""
    some = {"name": "some", "key": "some-key", "models": ["large", "not-here"]}
    file = key_file(tmp_path, some, {"name": "none", "key": "none-key", "models": ["not-here"]}, ENTRIES[0])
    api = make_api(api_key_file=file)
    api.context.model_names = ("small", "large")

    def ask(path: str, key: str, **fields: Any) -> tuple[int, str]:
        response = api.post(path, fields, x_api_key=key)
        return response.status_code, response.json().get("error", {}).get("message", "")

    for path, fields in (
        (CHAT, {"messages": MESSAGES}),
        (COMPLETIONS, {"prompt": "hi"}),
        ("/tokenize", {"prompt": ""}),
    ):
        assert ask(path, "some-key", model="large", **fields) == (200, "")
        assert ask(path, "app-key", model="small", **fields) == (200, "")
        refused = (404, "The model 'small' does not exist. Served here: large.")
        assert ask(path, "some-key", model="small", **fields) == refused
        assert ask(path, "none-key", **fields)[0] == 404
    assert api.post(CHAT, {"messages": MESSAGES}, x_api_key="some-key").json()["model"] == "large", "if none is named"
    for key, names in (("some-key", ["large"]), ("none-key", []), ("app-key", ["small", "large"])):
        listed = api.get("/v1/models", x_api_key=key).json()["data"]
        assert [each["id"] for each in listed] == names
    assert api.get("/v1/models/small", x_api_key="some-key").status_code == 404


def test_admin_routes_stay_shut_where_nobody_has_an_admin_key(make_api: MakeApi) -> None:
    assert send(make_api(), "GET", "/admin/config").status_code == 403
    assert send(make_api(api_key=("k",)), "GET", "/admin/config", key="k").status_code == 403


def test_requests_a_minute_are_counted_by_key_and_refused_with_the_seconds_to_wait(
    make_api: MakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P12: 429, Retry-After and the headers that OpenAI's clients look at."""
    now = 1000.0
    monkeypatch.setattr("hybrid_serve.server.keys.monotonic", lambda: now)
    file = key_file(tmp_path, {"name": "slow", "key": "slow-key", "requests_per_minute": 3}, ENTRIES[0])
    api = make_api(api_key_file=file)
    body = {"messages": MESSAGES}
    remaining = []
    for _ in range(3):
        response = api.post(CHAT, body, x_api_key="slow-key")
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        remaining.append(response.headers["x-ratelimit-remaining-requests"])
    assert remaining == ["2", "1", "0"]
    refused = api.post(CHAT, body, x_api_key="slow-key")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
    assert refused.headers["x-ratelimit-reset-requests"] == "60.0s"
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert error["message"] == "This key has 3 requests a minute."
    assert api.get("/v1/models", x_api_key="slow-key").status_code == 200, "reading costs nothing"
    other = api.post(CHAT, body, x_api_key="app-key")
    assert other.status_code == 200
    assert not [name for name in other.headers if name.startswith("x-ratelimit")]
    now += 20.0
    assert api.post(CHAT, body, x_api_key="slow-key").status_code == 200
    assert api.post(CHAT, body, x_api_key="slow-key").status_code == 429


def test_requests_at_once_are_counted_by_key_and_free_their_place_however_they_end(
    make_api: MakeApi, tmp_path: Path
) -> None:
    engine = FakeEngine(says("x" * 9))
    engine.gates[1] = asyncio.Event()
    api = make_api(engine, api_key_file=key_file(tmp_path, {"name": "two", "key": "two-key", "max_concurrent": 2}))

    async def scenario() -> None:
        def start() -> asyncio.Task[httpx.Response]:
            body = {"messages": MESSAGES, "stream": True}
            return asyncio.ensure_future(api.client.post(CHAT, json=body, headers={"x-api-key": "two-key"}))

        first, second = start(), start()
        while len(engine.calls) < 2:
            await asyncio.sleep(0)
        refused = await start()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_concurrent_requests"
        assert refused.headers["retry-after"] == "1"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        third = start()
        while len(engine.calls) < 3:
            await asyncio.sleep(0)
        engine.gates[1].set()
        assert [(await task).status_code for task in (second, third)] == [200, 200]
        assert (await start()).status_code == 200

    api.run(scenario())


def test_the_file_is_read_again_when_it_changes_and_kept_when_it_is_bad(
    make_api: MakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P12: a key that is taken out is refused within 2 seconds; a running count survives."""
    monkeypatch.setattr(file_watch, "INTERVAL", 0.01)
    old = {"name": "old", "key": "old-key", "requests_per_minute": 5}
    new = {"name": "new", "key": "new-key"}
    file = Path(key_file(tmp_path, old))
    api = make_api(api_key_file=str(file))
    outcomes = api.context.metrics.num_reloads

    def replace(text: str) -> None:
        other = tmp_path / "other"
        other.write_text(text)
        other.chmod(0o600)
        os.replace(other, file)

    async def until(outcome: str, count: int) -> None:
        end = time.monotonic() + 2
        while outcomes["key file", outcome] < count:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    async def status(key: str) -> int:
        return (await api.client.get("/v1/models", headers={"x-api-key": key})).status_code

    async def scenario() -> None:
        watching = asyncio.ensure_future(watch(watched_files(api.context, None), outcomes))
        assert (await status("old-key"), await status("new-key")) == (200, 401)
        await asyncio.sleep(0.03)
        replace(json.dumps([new]))
        await until("ok", 1)
        assert (await status("old-key"), await status("new-key")) == (401, 200)
        for count, bad in enumerate(("[", json.dumps([{"name": "x"}]), "- {name: 7 7, key: canary}"), start=1):
            replace(bad)
            await until("refused", count)
            assert (await status("old-key"), await status("new-key")) == (401, 200)
        file.unlink()
        await until("refused", 4)
        assert await status("new-key") == 200
        replace(json.dumps([old]))
        await until("ok", 2)
        assert (await status("old-key"), await status("new-key")) == (200, 401)
        watching.cancel()

    with caplog.at_level(logging.INFO):
        api.run(scenario())
    assert "the new key file is not used, the old one stays" in caplog.text
    assert "canary" not in caplog.text
    assert "-key" not in caplog.text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- {name: a}", "a needs either key or sha256"),
        ("- {name: a, key: k, sha256: " + "0" * 64 + "}", "a needs either key or sha256"),
        ("- {name: a, key: canary-1}\n- {name: a, key: canary-2}", "two entries have the same name"),
        ("- {name: a, key: canary}\n- {name: b, key: canary}", "two entries have the same key"),
        ("- {name: a, key: canary, scopes: [root]}", "Invalid enum value 'root' - at `$[0].scopes[0]`"),
        ("- {name: a, key: canary, limit: 3}", "Object contains unknown field `limit` - at `$[0]`"),
        ("- {name: a, key: canary, requests_per_minute: -1}", "Expected `int` >= 0 - at `$[0].requests_per_minute`"),
        ("- {name: a, key: canary é}", "a has a key with a space"),
        ("- {name: 'a b', key: canary}", "$[0].name"),
        ("canary: 1", "Expected `array`, got `object`"),
        ("- {name: a, key: canary", "it is not YAML, line 1"),
        ("- !!python/object/apply:os.system [canary]", "Expected `object`, got `array` - at `$[0]`"),
        ("#" * (2**20 + 1), "it has 1048577 bytes, at most 1048576 are read"),
    ],
)
def test_a_bad_key_file_ends_the_start_and_shows_no_key(make_api: MakeApi, tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(StartupError) as caught:
        make_api(api_key_file=str(file))
    failure = caught.value.failure
    assert (failure.code, failure.exit_code) == ("HS-E042", 2)
    assert why in failure.why
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"api_key": ("a", "b")}, False),
        ({"api_key": ("a", "b"), "prefix_cache_scope": "global"}, True),
        ({"api_key": ("a",), "admin_api_key": ("b",)}, False),
        ({"api_key": ("a", "b"), "prefix_cache_scope": "key"}, False),
    ],
)
def test_keys_share_the_prefix_cache_only_where_that_is_wanted(
    make_api: MakeApi, options: dict[str, Any], share: bool
) -> None:
    """ADV-52: nor can one key name the salt of another."""
    api = make_api(**options)
    for path, body in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "hi"})):
        for key in ("a", "b"):
            api.post(path, {**body, "cache_salt": "s"}, x_api_key=key)
        forged = api.post(path, body | {"cache_salt": "api-key-1\0s"}, x_api_key="b")
        assert forged.status_code == 400
    salts = [call.cache_salt for call in api.engine.calls]
    assert len(salts) == 4
    assert (salts[0] == salts[1]) == (salts[2] == salts[3]) == share
    alone = make_api(api_key=("a",))
    alone.post(CHAT, {"messages": MESSAGES}, x_api_key="a")
    assert alone.engine.calls[0].cache_salt == b""


def test_the_example_of_the_page_is_a_key_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
    (tmp_path / "keys.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    team, scraper = read_key_file(tmp_path / "keys.yaml")
    assert (team.requests_per_minute, team.max_concurrent, sorted(team.scopes)) == (600, 16, ["infer", "metrics"])
    assert (scraper.digest, [*scraper.scopes]) == (hashlib.sha256(b"secret").digest(), ["metrics"])


def test_a_key_file_that_others_may_write_is_refused(make_api: MakeApi, tmp_path: Path) -> None:
    """Exit code 14."""
    file = Path(key_file(tmp_path, ENTRIES[0]))
    file.chmod(0o600 | stat.S_IWOTH)
    with pytest.raises(StartupError, match="others can write") as caught:
        make_api(api_key_file=str(file))
    assert caught.value.failure.exit_code == 14


def test_an_empty_key_file_lets_nobody_in(make_api: MakeApi, tmp_path: Path) -> None:
    api = make_api(api_key_file=key_file(tmp_path))
    assert send(api, "GET", "/v1/models").status_code == 401
