"""Keys take turns: a noisy neighbour waits for himself (F-45)."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack
from pathlib import Path

from api_harness import CHAT, MESSAGES, Api, says
from engine_harness import EngineThread, ids, params, tokens_of, until
from fake_engine import FakeEngine
from fake_executor import FakeExecutor, expected
from hybrid_serve.client import ChoiceOutput
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.config import SchedulerConfig
from hybrid_serve.server.turns import CREDIT, Turn, Turns


def test_of_one_key_the_order_stays_and_another_comes_between_by_the_length_of_prompts() -> None:
    now = 1000.0
    turns = Turns(lambda: now)
    with ExitStack() as open_requests:

        def take(key: str, num_tokens: int, priority: int = 0, longest_wait: float = 0.0) -> Turn:
            return open_requests.enter_context(turns.taken(key, priority, num_tokens, longest_wait))

        noisy = [take("noisy", 1000) for _ in range(3000)]
        assert [one.priority for one in noisy] == sorted(one.priority for one in noisy)
        urgent, late = take("noisy", 1000, -1), take("noisy", 1000, 1)
        assert urgent.priority < noisy[0].priority < noisy[-1].priority < late.priority
        for one in noisy[:300]:
            one.came()
        now = 1600.0  # two seconds a request: the clock says nothing of whose turn it is
        quiet = [take("quiet", 250, 0, 600.0) for _ in range(9)]
        ahead = [sum(one.priority < each.priority for one in noisy) for each in quiet]
        assert ahead[0] < 300, "the next place, also before those that run"
        assert all(299 <= one <= 303 for one in ahead[1:]), ahead
        assert ahead[-1] - ahead[1] in (1, 2), "then one of the long prompts for four of the short ones"
        other = take("other", 250, 0, 600.0)
        assert other.priority == quiet[0].priority
    with turns.taken("noisy", 0, 1000, 0.0) as again:
        assert again.priority == (1600 - CREDIT) * 50, "whoever has nothing open owes nothing"


def test_no_number_of_requests_goes_ahead_of_one_that_waits() -> None:
    """Each that does brings it nearer."""
    now = 1000.0
    turns = Turns(lambda: now)
    with ExitStack() as open_requests:
        waiting = [open_requests.enter_context(turns.taken("noisy", 0, 1000, 0.0)) for _ in range(3)][-1]
        for number in range(200):
            now += 1.0
            with turns.taken(f"key {number}", 0, 1000, now - 1000.0) as passing:
                if passing.priority > waiting.priority:
                    break
                passing.came()
        assert 50 < number < 150


def test_an_api_server_that_has_seen_no_turn_come_gives_the_earliest_that_there_can_be() -> None:
    """The flood came through another one."""
    now = 1000.0
    turns, elsewhere = Turns(lambda: now), Turns(lambda: now)
    with ExitStack() as open_requests:
        flood = [open_requests.enter_context(elsewhere.taken("noisy", 0, 1000, 0.0)) for _ in range(500)]
        now = 1050.0
        quiet = [open_requests.enter_context(turns.taken("quiet", 0, 100, 49.95)) for _ in range(3)]
        assert sum(one.priority < quiet[-1].priority for one in flood) <= 2


def test_any_priority_at_any_time_is_a_number_of_64_bits() -> None:
    clock = iter((0.0, 1e5, 1e12) * 3)
    turns = Turns(clock.__next__)
    for _ in range(3):
        for priority in (-(2**31), 0, 2**31 - 1):
            with turns.taken("key", priority, 10, 0.0) as turn:
                assert -(2**63) <= turn.priority < 2**63
                assert turn.priority >> 32 == priority


def test_without_keys_requests_have_the_priority_that_they_say() -> None:
    engine = FakeEngine(says("one"))
    api = Api(engine)
    for priority in (0, 3, -2):
        api.chat(priority=priority)
    assert [call.priority for call in engine.calls] == [0, 3, -2]
    api.close()


def test_with_keys_an_engine_is_told_whose_turn_it_is() -> None:
    engine = FakeEngine(says("one"))
    api = Api(engine, api_key=("a", "b"))

    async def ask(key: str) -> int:
        headers = {"x-api-key": key}
        return (await api.client.post(CHAT, json={"messages": MESSAGES}, headers=headers)).status_code

    async def main() -> list[int]:
        gate = engine.gates[0] = asyncio.Event()
        asked = [asyncio.create_task(ask("a")) for _ in range(20)]
        await until(lambda: len(engine.calls) == 20)
        asked.append(asyncio.create_task(ask("b")))
        await until(lambda: len(engine.calls) == 21)
        gate.set()
        return await asyncio.gather(*asked)

    assert set(api.run(main())) == {200}
    assert engine.calls[-1].priority < engine.calls[-2].priority
    api.close()


def test_the_key_file_says_how_much_a_key_counts(tmp_path: Path) -> None:
    """P12: a weight of 4 is a place four times as often, and a priority comes before all of that."""
    file = tmp_path / "keys.yaml"
    entries = [{"name": "a", "key": "a"}, {"name": "b", "key": "b", "weight": 4}]
    file.write_text(json.dumps([*entries, {"name": "c", "key": "c", "priority": -1}]))
    file.chmod(0o600)
    engine = FakeEngine(says("one"))
    api = Api(engine, api_key_file=str(file))

    async def flood(key: str) -> list[int]:
        engine.gates[0] = asyncio.Event()
        before = len(engine.calls)
        headers = {"x-api-key": key}
        long = [{"role": "user", "content": "hello " * 150}]
        asked = [api.client.post(CHAT, json={"messages": long}, headers=headers) for _ in range(42)]
        running = asyncio.gather(*asked)
        await until(lambda: len(engine.calls) == before + 42)
        engine.gates[0].set()
        assert {response.status_code for response in await running} == {200}
        return sorted(call.priority for call in engine.calls[before:])

    first, second, third = (api.run(flood(key)) for key in "abc")
    steps = first[-1] - first[1], second[-1] - second[1]  # the first of a key goes ahead
    assert 3 < steps[0] / steps[1] < 5
    assert third[-1] < min(first[0], second[0])
    assert third[0] >> 32 == -1
    api.close()


def test_a_short_request_of_a_quiet_key_does_not_wait_behind_a_flood(tmp_path: Path) -> None:
    """F-45: 4 places, 60 requests of one key; another's wait for one place at most, not for the flood's end."""
    turns = Turns()

    async def run(client: ZmqEngineClient, key: str, prompt: list[int], max_tokens: int) -> list[ChoiceOutput]:
        stats, age = client.engines[0].stats, client.engines[0].stats_age
        with turns.taken(key, 0, len(prompt), stats.waiting_seconds + age if stats.num_waiting else 0.0) as turn:
            found = []
            async with client.generate(ids(prompt), params(max_tokens), priority=turn.priority) as stream:
                async for outputs in stream:
                    turn.came()
                    found += outputs
            return found

    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            flood = [asyncio.create_task(run(client, "noisy", [1, index], 60)) for index in range(60)]
            ended_before = []
            for number in range(4):
                await until(lambda: client.engines[0].stats.num_waiting > 20)
                before = sum(task.done() for task in flood)
                assert tokens_of(await run(client, "quiet", [2, number], 2)) == expected([2, number], 1, 2)
                ended_before.append(sum(task.done() for task in flood) - before)
                await asyncio.sleep(0.02)
            assert max(ended_before) <= 8, ended_before  # places that became free while one of it waited and ran
            assert not flood[-1].done()
            for index, task in enumerate(flood):
                assert tokens_of(await task) == expected([1, index], 1, 60)

    with EngineThread(tmp_path, FakeExecutor(delay=0.003), scheduler=SchedulerConfig(max_num_seqs=4)) as engine:
        began = time.monotonic()
        asyncio.run(main(engine))
        assert time.monotonic() - began < 60
