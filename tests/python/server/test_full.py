"""A full engine is not asked (F-44): what would wait for the end of its step to be refused is refused at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from api_harness import CHAT, COMPLETIONS, MESSAGES, Api, says
from fake_engine import Call, FakeEngine
from hybrid_serve.wire import EngineStats, SamplingParams

MakeApi = Callable[..., Api]


def call() -> Call:
    return Call([1], SamplingParams(seed=0), 1, 0, (), b"", entered=True)


def full_engine(num_open: int, ranks: tuple[int, ...] = (0,)) -> FakeEngine:
    """Two of its requests may run at a time."""
    return FakeEngine(says("one"), stats=EngineStats(may_run=2), ranks=ranks, calls=[call() for _ in range(num_open)])


@contextmanager
def limited(make_api: MakeApi, engine: FakeEngine, waiting: int) -> Iterator[Api]:
    api = make_api(engine)
    api.context.live.change({"max_num_queued_reqs": waiting})
    yield api


@pytest.mark.parametrize(("path", "fields"), [(CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "hi"})])
def test_a_request_to_engines_that_are_all_full_is_refused_without_asking(
    make_api: MakeApi, path: str, fields: dict[str, object]
) -> None:
    engine = full_engine(5, ranks=(0, 1))
    with limited(make_api, engine, waiting=3) as api:
        response = api.post(path, fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"], response.headers["retry-after"]) == (503, "overloaded", "1")
        assert "10 requests run or wait, 10 may" in error["message"]
        assert len(engine.calls) == 5
        assert api.context.metrics.of(0).admission_rejections == 1
        engine.calls[0].left = True
        assert api.post(path, fields).status_code == 200, "there is room again"


def test_it_is_refused_before_its_body_is_looked_at_but_not_before_its_key(make_api: MakeApi) -> None:
    with limited(make_api, full_engine(5), waiting=3) as api:
        assert api.post(COMPLETIONS, b"{no json").status_code == 503
    engine = full_engine(5)
    api = make_api(engine, api_key=("secret",))
    api.context.live.change({"max_num_queued_reqs": 3})
    assert api.post(COMPLETIONS, {"prompt": "hi"}).status_code == 401


def test_what_needs_no_engine_is_answered(make_api: MakeApi) -> None:
    with limited(make_api, full_engine(5), waiting=3) as api:
        assert api.post("/tokenize", {"prompt": "hi"}).status_code == 200


def test_without_a_limit_any_number_waits(make_api: MakeApi) -> None:
    with limited(make_api, full_engine(5000), waiting=0) as api:
        assert api.post(COMPLETIONS, {"prompt": "hi"}).status_code == 200
