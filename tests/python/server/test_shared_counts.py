"""One exposition for several API servers, which may end and come back (P22)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest

from api_harness import CHAT, MESSAGES, Api, says
from fake_engine import FakeEngine
from hybrid_serve.server.metrics import Metrics
from hybrid_serve.server.shared_counts import SharedCounts, publish
from hybrid_serve.shared_memory import COUNTS_SLOT_BYTES

MakeApi = Callable[..., Api]
# What depends on the clock or on the process, not on the load.
VARYING = re.compile(r"_seconds|^process_|^python_|^#")


@pytest.fixture
def memory() -> memoryview:
    """Four slots."""
    return memoryview(bytearray(4 * COUNTS_SLOT_BYTES))


def use(api: Api, n: int) -> None:
    api.post(CHAT, {"messages": MESSAGES, "n": n}, x_api_key="k")
    api.post(CHAT, {}, x_api_key="k")
    api.get("/nope", x_api_key="k")
    api.context.metrics.replayed(0, 2, 1)


def exposition(api: Api) -> list[str]:
    return [line for line in api.context.exposition.render().decode().splitlines() if not VARYING.search(line)]


def test_four_servers_say_what_one_would_say_of_the_same_load(make_api: MakeApi, memory: memoryview) -> None:
    def make() -> Api:
        return make_api(FakeEngine(says("one two three"), cached_tokens=4, num_preemptions=1), api_key=("k",))

    one, four = make(), [make() for _ in range(4)]
    shared = [SharedCounts(memory, index) for index in range(4)]
    for index, api in enumerate(four):
        use(one, index + 1)
        use(api, index + 1)
        api.context.exposition.others = shared[index].others
        shared[index].write(api.context.metrics.flat())
    assert len(exposition(one)) > 150
    for api in four:
        assert exposition(api) == exposition(one)
        assert api.get("/load", x_api_key="k").json() == one.get("/load", x_api_key="k").json()


def test_a_server_that_comes_back_goes_on_counting(make_api: MakeApi, memory: memoryview) -> None:
    first = make_api(api_key=("k",))
    use(first, 2)
    SharedCounts(memory, 1).write(first.context.metrics.flat())
    second = make_api(api_key=("k",))
    second.context.metrics.add(SharedCounts(memory, 1).own())
    assert second.context.metrics.flat() == first.context.metrics.flat()
    use(second, 2)
    assert second.context.metrics.http.requests[CHAT, "POST", "2xx"] == 2


def test_counts_are_published_and_at_the_end_once_more(make_api: MakeApi, memory: memoryview) -> None:
    api = make_api()
    writer, reader = SharedCounts(memory, 0), SharedCounts(memory, 1)

    async def scenario() -> None:
        for _ in range(3):
            api.context.lifecycle.opened()
        task = asyncio.ensure_future(publish(writer, api.context))
        await asyncio.sleep(0)
        assert reader.others()[0]["open\x1fdemo"] == [3]
        api.context.metrics.of(0).prompt_tokens += 5
        task.cancel()
        await asyncio.wait({task})

    api.run(scenario())
    assert reader.others()[0]["engine\x1f0\x1fnumber\x1fprompt_tokens"] == [5]
    assert "open\x1fdemo" not in reader.others()[0]


def test_a_reader_never_sees_half_of_what_is_written(memory: memoryview) -> None:
    writer, reader = SharedCounts(memory, 0), SharedCounts(memory, 1)
    assert reader.others() == [{}, {}, {}]
    writer.write({"a": [1.0]})
    assert reader.others()[0] == {"a": [1.0]}
    memory[9:10] = b"\xff"  # somebody is writing: the check does not fit
    assert reader.others()[0] == {"a": [1.0]}
    writer.write({"a": [2.0], "b": [3.0]})
    assert reader.others()[0] == {"a": [2.0], "b": [3.0]}
    memory[:4] = b"\xff\xff\xff\xff"  # a length beyond the slot
    assert reader.others()[0] == {"a": [2.0], "b": [3.0]}


def test_what_does_not_fit_is_said_and_the_last_counts_stay(
    memory: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    writer = SharedCounts(memory, 3)
    writer.write({"a": [1.0]})
    writer.write({"a": [1.0] * COUNTS_SLOT_BYTES})
    assert writer.own() == {"a": [1.0]}
    assert "do not fit a slot" in caplog.text
    with pytest.raises(ValueError, match="API server 4 has no slot, there are 4"):
        SharedCounts(memory, 4)


def test_counts_of_another_version_are_left(make_api: MakeApi) -> None:
    metrics = Metrics()
    metrics.of(0)
    before = metrics.flat()
    metrics.add({"number\x1fnew": [1], "what": [1], "http\x1fnew": [1], "engine\x1f0\x1ffinished\x1fnew": [1]})
    metrics.add({"engine\x1f0\x1fhistogram\x1frequest_params_n": [1.0, 2.0]})  # other bounds
    assert metrics.flat() == before
