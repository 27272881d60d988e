"""GET and PATCH /admin/config (P19)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import httpx
import pytest

from api_harness import CHAT, MESSAGES, Api
from hybrid_serve import logging as log_lines
from hybrid_serve import shared_memory
from hybrid_serve.config import Config
from hybrid_serve.live import LIVE, with_values
from hybrid_serve.shared_memory import SharedMemory

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


def test_the_log_level_and_the_limits_of_the_engine_change_at_once(admin: Any) -> None:
    assert admin(log_level="debug", max_num_queued_reqs=7, max_num_seqs=2).status_code == 200
    assert logging.getLogger("hybrid_serve").level == logging.DEBUG
    assert admin.api.engine.limits == [(7, 2)]
    assert admin(max_logprobs=1).status_code == 200
    assert set(admin.api.engine.limits) == {(7, 2)}


def test_every_api_server_has_what_any_of_them_was_told_and_so_has_one_that_is_started_again(make_api: MakeApi) -> None:
    """P19: one place for all of them, which outlives each."""
    fd = shared_memory.make(2)
    memory = SharedMemory(fd, 2)
    keys = {"api_key": ("k",), "admin_api_key": ("boss",)}
    one, other = (make_api(memory=memory, index=index, **keys) for index in range(2))

    def told(api: Api) -> Any:
        return api.get("/admin/config", x_api_key="boss").json()

    def patch(api: Api, **changes: Any) -> None:
        send = api.client.patch("/admin/config", headers={"x-api-key": "boss"}, json=changes)
        assert api.run(send).status_code == 200

    patch(one, max_logprobs=3)
    assert told(other) == told(one) == told(make_api(memory=memory, index=1, **keys))
    assert other.post(CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 4}, x_api_key="k").is_error
    patch(other, max_num_queued_reqs=9, strict_requests=True)
    patch(one, max_num_queued_reqs=5)
    later = make_api(memory=memory, index=0, **keys)
    found = [told(api) for api in (one, other, later)]
    assert found[0] == found[1] == found[2]
    values = [found[0][name] for name in ("max_logprobs", "max_num_queued_reqs", "strict_requests")]
    assert values == [3, 5, True]
    for api in (one, other, later):
        assert api.engine.limits[-1] == (5, 0), "all tell an engine that is started again the same"
        assert (
            api.post(CHAT, {"messages": MESSAGES}, x_api_key="k").json()["system_fingerprint"]
            == one.context.fingerprint
        )
    os.close(fd)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"max_logprobs": -1}, "invalid_value", "max_logprobs"),
        ({"max_logprobs": "many"}, "invalid_type", "max_logprobs"),
        ({"max_num_seqs": 33}, "invalid_value", "max_num_seqs"),
        ({"max_num_seqs": -1}, "invalid_value", "max_num_seqs"),
        ({"log_level": "loud"}, "invalid_value", "log_level"),
        ({"port": 1}, None, None),
        ({}, "missing_required_parameter", None),
        ({"max_request_bytes": 5000, "max_logprobs": -1}, "invalid_value", "max_logprobs"),
    ],
)
def test_a_bad_change_changes_nothing(admin: Any, changes: dict[str, Any], code: str | None, param: str | None) -> None:
    context = admin.api.context
    context.started_with = context.config = with_values(context.config, {"max_num_seqs": 32})
    before = context.config
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
