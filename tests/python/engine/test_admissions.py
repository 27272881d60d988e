"""How long a new request will wait: measured by the engine, told by the client (P6)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from engine_harness import EngineThread, collect, tokens_of, until
from fake_executor import FakeExecutor, expected
from hybrid_serve.config import SchedulerConfig
from hybrid_serve.engine.admissions import Admissions


def test_the_pace_is_of_those_that_had_to_wait_and_of_the_time_in_which_they_did() -> None:
    admissions = Admissions()
    admissions.saw(100.0, 3, False)  # there is room: nobody waits for anybody
    assert admissions.seconds_each == 0
    admissions.saw(200.0, 1, True)
    admissions.saw(202.0, 1, True)
    assert admissions.seconds_each == 2
    admissions.saw(204.0, 1, False)
    admissions.saw(300.0, 5, True)  # 96 s with room are not counted, nor who came in them
    admissions.saw(301.0, 0, True)
    admissions.saw(304.0, 2, True)
    assert admissions.seconds_each == pytest.approx(8 / 4)
    admissions.saw(344.0, 0, True)  # and now nobody is let in for a long time
    assert admissions.seconds_each == pytest.approx(48 / 5)


def test_a_new_request_is_told_about_as_long_as_it_will_wait(tmp_path: Path) -> None:
    """With one place, from the second request that had to wait on."""

    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            assert client.engines[0].wait_seconds == 0
            running = [asyncio.create_task(collect(client, [1, index], max_tokens=100)) for index in range(3)]
            await running[1]
            await until(lambda: client.engines[0].stats.admission_seconds > 0)
            running += [asyncio.create_task(collect(client, [1, index], max_tokens=100)) for index in (3, 4, 5)]
            await until(lambda: client.engines[0].stats.num_waiting == 3)
            told, began = client.engines[0].wait_seconds, time.monotonic()
            running.append(asyncio.create_task(collect(client, [1, 6], max_tokens=1)))
            await running[-1]
            waited = time.monotonic() - began
            assert waited * 0.5 < told < waited * 2, "a machine that is busy does not keep its pace"
            for index, task in enumerate(running[:-1]):
                assert tokens_of(await task) == expected([1, index], 1, 100)
            await until(lambda: client.engines[0].wait_seconds == 0)

    with EngineThread(tmp_path, FakeExecutor(delay=0.01), scheduler=SchedulerConfig(max_num_seqs=1)) as engine:
        asyncio.run(main(engine))
