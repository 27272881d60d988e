"""Times that a request may take: refused at once where it is hopeless, dropped before it is computed, cut (P6)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from api_harness import CHAT, COMPLETIONS, MESSAGES, Api, events_of, says
from fake_engine import FakeEngine
from hybrid_serve.client import ChoiceEvent
from hybrid_serve.config import SchedulerConfig
from hybrid_serve.server.patience import ENDLESS, Patience, Progress, bounded
from hybrid_serve.server.protocol import CompletionRequest

MakeApi = Callable[..., Api]


def stuck(at: int = 0, **fields: Any) -> FakeEngine:
    """One that gives no more from that position on."""
    return FakeEngine(says("one two three"), gates={at: asyncio.Event()}, **fields)


def test_a_request_that_waits_longer_than_it_may_is_a_429_and_leaves_the_queue(make_api: MakeApi) -> None:
    engine = stuck(wait_seconds=0.0)
    api = make_api(engine)
    began = time.monotonic()
    response = api.post(CHAT, {"messages": MESSAGES, "max_queue_time_s": 0.3})
    assert 0.3 <= time.monotonic() - began < 3
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    error = response.json()["error"]
    assert (error["type"], error["code"], error["hs_code"]) == ("overloaded", "wait_too_long", "HS-E124")
    assert error["estimated_wait_s"] == 0
    assert engine.calls[0].left, "nobody computes it any more"
    assert engine.calls[0].unfinished_when_left == 1
    assert 'admission_rejections_total{model_name="demo",reason="time_limit"} 1.0' in api.get("/metrics").text


@pytest.mark.parametrize("fields", [{"max_queue_time_s": 4}, {"ttft_slo_ms": 4000}, {"deadline_s": 4}])
def test_one_that_would_be_late_is_refused_before_an_engine_hears_of_it(
    make_api: MakeApi, fields: dict[str, float]
) -> None:
    engine = FakeEngine(says("one"), wait_seconds=7.2)
    api = make_api(engine)
    response = api.post(COMPLETIONS, {"prompt": "hi", "stream": True, **fields})
    assert response.status_code == 429, "also of a stream, which has not begun"
    assert response.headers["retry-after"] == "8"
    assert response.json()["error"]["estimated_wait_s"] == 7.2
    assert engine.calls == []
    assert api.post(COMPLETIONS, {"prompt": "hi"}).status_code == 200, "who can wait, waits"
    assert api.post(COMPLETIONS, {"prompt": "hi", "max_queue_time_s": 10}).status_code == 200


def test_a_place_in_time_is_enough_for_the_queue_and_not_for_the_first_token(make_api: MakeApi) -> None:
    admitted = [ChoiceEvent(0, 0.0, "admitted")]
    api = make_api(stuck(events=lambda: admitted))
    body = {"messages": MESSAGES, "max_queue_time_s": 0.1, "ttft_slo_ms": 400}
    began = time.monotonic()
    response = api.post(CHAT, body)
    assert (response.status_code, time.monotonic() - began > 0.4) == (429, True)
    assert "no token within 0.4 s" in response.json()["error"]["message"]


def test_a_reply_that_is_not_complete_at_its_deadline_is_cut_and_does_not_look_complete(make_api: MakeApi) -> None:
    api = make_api(stuck(at=2))
    whole = api.post(CHAT, {"messages": MESSAGES}, x_request_timeout="0.3")
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    stream = api.post(CHAT, {"messages": MESSAGES, "stream": True, "deadline_s": 0.3}, x_request_timeout="60")
    events = events_of(stream.text)
    assert stream.status_code == 200
    assert json.loads(events[-1])["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in events
    assert all(call.left for call in api.engine.calls)


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "1e3", "nan", "1,2", "9" * 9])
def test_a_header_that_is_no_time_is_refused(make_api: MakeApi, value: str) -> None:
    response = make_api().post(CHAT, {"messages": MESSAGES}, x_request_timeout=value)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout")


def test_the_request_beats_its_header_and_that_the_server() -> None:
    server = SchedulerConfig(max_queue_time_s=5, ttft_slo_ms=3000, deadline_s=60)
    plain = CompletionRequest(prompt="x")
    own = CompletionRequest(prompt="x", max_queue_time_s=1, ttft_slo_ms=500, deadline_s=7)
    assert Patience.of(plain, [], SchedulerConfig()) == ENDLESS
    assert Patience.of(plain, [], server) == (5, 3, 60)
    assert Patience.of(plain, [b"9.5"], server) == (5, 3, 9.5)
    assert Patience.of(own, [b"9.5"], server) == (1, 0.5, 7)


def test_what_is_in_time_comes_whole_and_in_order() -> None:
    async def numbers() -> Any:
        for number in range(50):
            await asyncio.sleep(0)
            yield number

    async def main() -> list[int]:
        patient = Patience(queue=30, whole=60)
        found = bounded(numbers(), patient, time.monotonic(), lambda: Progress.WAITING, lambda: 0.0)
        return [item async for item in found]

    assert asyncio.run(main()) == list(range(50))
