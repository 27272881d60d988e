"""What an API server hears of a request besides its tokens: its timeline's events, from the real core (P10)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from engine_harness import EngineThread, ids, params
from fake_executor import FakeExecutor
from hybrid_serve.client import ChoiceEvent
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.config import SchedulerConfig


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def events_of(client: ZmqEngineClient, prompt: Sequence[int], n: int = 1, **options: Any) -> list[ChoiceEvent]:
    began = monotonic()
    async with client.generate(ids(prompt), params(**options), n=n) as stream:
        async for _ in stream:
            pass
    assert all(began <= event.at <= monotonic() for event in stream.events)
    return stream.events


def whats(events: Sequence[ChoiceEvent]) -> list[tuple[str, int]]:
    return [(event.what, event.value) for event in events]


def test_a_long_prompt_is_told_chunk_by_chunk_with_the_batches(tmp_path: Path) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            prompt = [token % 1000 for token in range(1200)]  # of 512 tokens a step
            events = await events_of(client, prompt, max_tokens=3)
            assert whats(events) == [
                ("admitted", 0),
                ("chunk", 512),
                ("chunk", 512),
                ("chunk", 176),
                ("first_token", 0),
                ("finished", 0),
            ]
            assert [(event.num_tokens, event.num_seqs) for event in events[1:4]] == [(512, 1), (512, 1), (176, 1)]
            assert (events[-1].num_tokens, events[-1].num_seqs) == (1, 1)
            assert {event.waited_for for event in events} == {"nothing"}
            again = await events_of(client, prompt, max_tokens=1)
            assert whats(again)[:2] == [("admitted", 1184), ("chunk", 16)]

    with EngineThread(tmp_path) as engine:
        run(main(engine))


@pytest.mark.parametrize("depth", [1, 2])
def test_who_waits_is_told_for_what(tmp_path: Path, depth: int) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            first = asyncio.ensure_future(events_of(client, [1] * 20, max_tokens=150))
            second = asyncio.ensure_future(events_of(client, [2] * 20, max_tokens=150))
            await asyncio.sleep(0.02)
            late = await events_of(client, [3] * 20, max_tokens=2)
            assert late[0].what == "admitted"
            assert late[0].waited_for == "sequences"
            assert {event.waited_for for event in await first + await second} == {"nothing"}

    executor = FakeExecutor(depth=depth, delay=0.002)
    with EngineThread(tmp_path, executor, scheduler=SchedulerConfig(max_num_seqs=2)) as engine:
        run(main(engine))


def test_a_preempted_request_is_told_so_and_admitted_again_when_there_are_blocks(tmp_path: Path) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            both = [events_of(client, [token] * 40, max_tokens=100, seed=token) for token in (1, 2)]
            kept, lost = sorted(await asyncio.gather(*both), key=lambda events: whats(events).count(("preempted", 0)))
            events = max(kept, lost, key=len)
            found = [event.what for event in events]
            assert found.count("preempted") >= 1
            at = found.index("preempted")
            assert found[at : at + 3] == ["preempted", "admitted", "chunk"]
            again = events[at + 1]
            assert again.waited_for == "blocks"
            # What was lost is found in the cache or computed once more, and the token that was picked last besides.
            assert events[at].value + 1 == again.value + events[at + 2].value

    executor = FakeExecutor(num_blocks=12)
    with EngineThread(tmp_path, executor) as engine:
        run(main(engine))


def test_each_choice_of_a_request_has_its_own_events(tmp_path: Path) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            events = await events_of(client, list(range(37)), n=3, max_tokens=4)
            for choice in range(3):
                found = [event.what for event in events if event.choice == choice]
                assert found == ["admitted", "chunk", "first_token", "finished"]

    with EngineThread(tmp_path) as engine:
        run(main(engine))
