"""What the engine's loop does with its time, by the test's own clock, and of a real loop (FEATURES 4.1)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from engine_harness import EngineThread, collect, until
from fake_executor import FakeExecutor
from hybrid_serve.engine.phases import COMMIT, MESSAGES, SCHEDULE, SEND, SUBMIT, WAIT, Phases
from hybrid_serve.wire import STEP_PHASES, EngineStats


def test_each_moment_belongs_to_the_phase_that_ends_next_and_rest_to_none() -> None:
    now = 0
    phases = Phases(lambda: now)
    now += 1_000_000  # nobody asked for anything
    phases.rested()
    for phase, ns in ((SCHEDULE, 10), (SUBMIT, 20), (WAIT, 4_000), (COMMIT, 30)):
        now += ns
        phases.passed(phase)
    now += 50
    phases.sent()
    now += 5
    phases.passed(MESSAGES)
    assert dict(zip(STEP_PHASES, phases.totals, strict=True)) == {
        "messages": 5, "schedule": 10, "submit": 20, "wait": 4_000, "commit": 30, "send": 50,
    }  # fmt: skip
    assert phases.totals[SEND] == 50
    now += 3_000_000_000
    assert phases.step_age == pytest.approx(3.000000005)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_loop_that_waits_for_a_slow_device_says_so_and_does_not_count_its_sleep(tmp_path: Path, depth: int) -> None:
    async def main(engine: EngineThread) -> EngineStats:
        async with engine.client() as client:
            await asyncio.sleep(0.2)  # nothing to do
            await collect(client, [1, 2, 3], max_tokens=30)
            (link,) = client.engines
            await until(lambda: link.stats.steps == 30 and not link.stats.num_running)
            return link.stats

    with EngineThread(tmp_path, FakeExecutor(delay=0.01, depth=depth)) as engine:
        began = time.monotonic()
        stats = asyncio.run(main(engine))
        elapsed = time.monotonic() - began
    seconds = {name: us * 1e-6 for name, us in zip(STEP_PHASES, stats.phase_us, strict=True)}
    assert min(seconds.values()) > 0, "each was passed through"
    assert seconds["wait"] + seconds["submit"] >= 0.3 / depth * 0.9, seconds
    assert sum(seconds.values()) < elapsed - 0.19, "the sleep before the request is in no phase"


def test_statistics_say_how_long_the_oldest_request_waits_and_how_old_the_last_step_is(tmp_path: Path) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            (link,) = client.engines
            client.limit(0, 1)  # one runs, the others wait
            going = [asyncio.create_task(collect(client, [n], max_tokens=80)) for n in range(2)]
            await until(lambda: link.stats.num_waiting == 1)
            since = time.monotonic() - link.stats_age - link.stats.waiting_seconds
            await until(lambda: link.stats.waiting_seconds > 0.6)
            assert time.monotonic() - link.stats_age - link.stats.waiting_seconds == pytest.approx(since, abs=0.3)
            assert 0 <= link.stats.empty_slots < 16, "of the only one that runs"
            await until(lambda: link.stats.empty_slots > 0)
            await asyncio.gather(*going)
            await until(lambda: not link.stats.num_running)
            assert (link.stats.waiting_seconds, link.stats.empty_slots) == (0, 0)
            ended = time.monotonic()
            await asyncio.sleep(0.6)
            assert link.stats.step_age + link.stats_age == pytest.approx(time.monotonic() - ended, abs=0.25)

    with EngineThread(tmp_path, FakeExecutor(delay=0.02)) as engine:
        asyncio.run(asyncio.wait_for(main(engine), 60))
