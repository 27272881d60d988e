"""GET and PATCH /admin/config (P19)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import httpx
import pytest

from api_harness import CHAT, MESSAGES, Api
from hybrid_serve import logging as log_lines
from hybrid_serve.config import Config
from hybrid_serve.server.endpoints.admin import LIVE

MakeApi = Callable[..., Api]


@pytest.fixture
def admin(make_api: MakeApi) -> Iterator[Callable[..., httpx.Response]]:
    """Sends a PATCH; ``admin.api`` is the server."""
    api = make_api(api_key=("k",), admin_api_key=("boss",))

    def patch(body: bytes | None = None, **changes: Any) -> httpx.Response:
        headers = {"x-api-key": "boss", "content-type": "application/json"}
        sent = {"content": body} if body is not None else {"json": changes}
        return api.run(api.client.patch("/admin/config", headers=headers, **sent))

    patch.api = api  # type: ignore[attr-defined]
    root, ours = logging.getLogger().level, logging.getLogger("hybrid_serve").level
    yield patch
    logging.getLogger().setLevel(root)
    logging.getLogger("hybrid_serve").setLevel(ours)


def test_what_can_be_changed_is_shown_and_takes_effect_with_the_next_request(admin: Any) -> None:
    api = admin.api
    shown = api.get("/admin/config", x_api_key="boss").json()
    assert tuple(shown) == LIVE
    assert shown["max_logprobs"] == 20
    question = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 5}
    assert api.post(CHAT, question, x_api_key="k").status_code == 200
    changed = admin(max_logprobs=4)
    assert changed.status_code == 200
    assert changed.json() == shown | {"max_logprobs": 4}
    assert api.post(CHAT, question, x_api_key="k").status_code == 400
    assert api.get("/admin/config", x_api_key="boss").json() == changed.json()
    admin(max_request_bytes=1024)
    assert api.post(CHAT, question | {"user": "x" * 2000}, x_api_key="k").status_code == 413
    admin(strict_requests=True)
    assert api.post(CHAT, question | {"nope": 1, "top_logprobs": 1}, x_api_key="k").status_code == 400


def test_the_log_level_and_the_queue_of_the_engine_change_at_once(admin: Any) -> None:
    assert admin(log_level="debug", max_num_queued_reqs=7).status_code == 200
    assert logging.getLogger("hybrid_serve").level == logging.DEBUG
    assert admin.api.engine.queue_limits == [7]
    assert admin(max_logprobs=1).status_code == 200
    assert admin.api.engine.queue_limits == [7]


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"max_logprobs": -1}, "invalid_value", "max_logprobs"),
        ({"max_logprobs": "many"}, "invalid_type", "max_logprobs"),
        ({"log_level": "loud"}, "invalid_value", "log_level"),
        ({"port": 1}, None, None),
        ({}, "missing_required_parameter", None),
        ({"max_request_bytes": 5000, "max_logprobs": -1}, "invalid_value", "max_logprobs"),
    ],
)
def test_a_bad_change_changes_nothing(admin: Any, changes: dict[str, Any], code: str | None, param: str | None) -> None:
    before = admin.api.context.config
    response = admin(**changes)
    assert response.status_code == 400
    error = response.json()["error"]
    if code:
        assert (error["code"], error["param"]) == (code, param)
    assert admin.api.context.config is before
    assert admin(body=b"{").json()["error"]["code"] == "invalid_json"


def test_a_change_is_written_down_with_the_name_of_the_key(admin: Any, caplog: pytest.LogCaptureFixture) -> None:
    admin(max_logprobs=3)
    assert "admin: admin-api-key-1 sets max_logprobs=3" in caplog.text
    assert "boss" not in caplog.text


def test_every_live_option_exists() -> None:
    options = {field.name for group in fields(Config) for field in fields(getattr(Config(), group.name))}
    assert set(LIVE) <= options
    with pytest.raises(ValueError, match="log level is 'loud'"):
        log_lines.set_level("loud")
