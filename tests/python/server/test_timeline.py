"""GET /v1/requests/{id}/timeline (P10): where a request's time went, for whom it may concern."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from api_harness import CHAT, MESSAGES, Api, says
from fake_engine import FakeEngine
from hybrid_serve.client import ChoiceEvent
from hybrid_serve.server import timeline as timeline_module

MakeApi = Callable[..., Api]


def ask(api: Api, id: str, key: str = "") -> dict[str, Any]:
    response = api.get(f"/v1/requests/{id}/timeline", **({"x_api_key": key} if key else {}))
    found: dict[str, Any] = response.json()
    return found | {"status": response.status_code}


def test_phases_are_those_of_server_timing_and_sum_to_the_whole(make_api: MakeApi) -> None:
    api = make_api(FakeEngine(says("one two three"), cached_tokens=4, num_preemptions=2, prefill_seconds=1e-3))
    began = monotonic()
    response = api.post(CHAT, {"messages": MESSAGES}, x_request_id="slow-one")
    elapsed = (monotonic() - began) * 1e3
    page = ask(api, "slow-one")
    assert page["status"] == 200
    assert page["state"] == "stop"
    phases = page["phases_ms"]
    assert list(phases) == ["queue", "prefill", "decode", "send"]
    assert sum(phases.values()) == pytest.approx(page["e2e_ms"], abs=0.01)
    assert page["e2e_ms"] <= elapsed
    header = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", ") if ";dur=" in part)
    assert {name: float(header[name]) for name in header} == {name: phases[name] for name in header}
    assert page["num_preemptions"] == 2
    assert (page["cached_tokens"], page["completion_tokens"]) == (4, response.json()["usage"]["completion_tokens"])
    assert page["events"][0] == {"event": "queued", "ms": 0.0}
    assert "hi" not in json.dumps(page), "the prompt is nobody's business"


def test_what_the_steps_did_is_listed_with_their_batches_and_reasons(make_api: MakeApi) -> None:
    engine = FakeEngine(says("one"))
    api = make_api(engine)
    engine.events = lambda: [
        ChoiceEvent(0, monotonic(), "admitted", 16, "blocks", 200, 5),
        ChoiceEvent(0, monotonic(), "chunk", 128, "nothing", 200, 5),
    ]
    api.post(CHAT, {"messages": MESSAGES}, x_request_id="a")
    _, admitted, chunk = ask(api, "a")["events"]
    del admitted["ms"], chunk["ms"]
    batch = {"choice": 0, "batch_tokens": 200, "batch_seqs": 5}
    assert admitted == {"event": "admitted", "tokens": 16, "waited_for": "blocks"} | batch
    assert chunk == {"event": "chunk", "tokens": 128} | batch


def test_a_request_that_runs_has_a_timeline_too(make_api: MakeApi) -> None:
    engine = FakeEngine(says("one two three"))
    engine.gates[0] = asyncio.Event()
    api = make_api(engine)

    async def look() -> dict[str, Any]:
        headers = {"content-type": "application/json", "x-request-id": "b"}
        running = asyncio.ensure_future(
            api.client.post(CHAT, content=json.dumps({"messages": MESSAGES}), headers=headers)
        )
        while not engine.calls or not engine.calls[0].entered:
            await asyncio.sleep(0.001)
        page: dict[str, Any] = (await api.client.get("/v1/requests/b/timeline")).json()
        engine.gates[0].set()
        await running
        return page

    page = api.run(look())
    assert page["state"] == "running"
    assert sum(page["phases_ms"].values()) == pytest.approx(page["e2e_ms"], abs=0.01)


def test_a_key_sees_its_own_requests_and_an_admin_all(make_api: MakeApi, tmp_path: Any) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(
        "- {name: one, key: k1}\n- {name: two, key: k2}\n- {name: boss, key: k3, scopes: [infer, admin]}\n"
        "- {name: eye, key: k4, scopes: [metrics]}\n"
    )
    file.chmod(0o600)
    api = make_api(api_key_file=str(file))
    for key in ("k1", "k2"):
        assert api.post(CHAT, {"messages": MESSAGES}, x_request_id=f"of-{key}", x_api_key=key).status_code == 200
    assert ask(api, "of-k1", "k1")["status"] == 200
    refused, unknown = ask(api, "of-k1", "k2"), ask(api, "never", "k2")
    assert refused["status"] == unknown["status"] == 404
    assert refused["error"]["code"] == "request_not_found"
    assert refused["error"]["message"].replace("of-k1", "never") == unknown["error"]["message"]
    assert ask(api, "of-k1", "k3")["status"] == ask(api, "of-k2", "k3")["status"] == 200
    assert ask(api, "of-k1", "k4")["status"] == 403
    assert ask(api, "of-k1")["status"] == 401
    # A key cannot hide another's by using its id.
    api.post(CHAT, {"messages": MESSAGES}, x_request_id="of-k1", x_api_key="k2")
    assert ask(api, "of-k1", "k1")["id"] == "of-k1"


def test_the_oldest_are_forgotten(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_module, "KEPT", 3)
    api = make_api()
    for number in range(5):
        api.post(CHAT, {"messages": MESSAGES}, x_request_id=f"r{number}")
    assert [ask(api, f"r{number}")["status"] for number in range(5)] == [404, 404, 200, 200, 200]


def test_one_of_several_api_servers_says_that_it_is_not_the_only_one(make_api: MakeApi) -> None:
    assert "API servers" not in ask(make_api(), "x")["error"]["message"]
    assert "3 API servers share the port" in ask(make_api(api_server_count=3), "x")["error"]["message"]
