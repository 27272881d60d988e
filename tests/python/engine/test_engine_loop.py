"""The real loop, scheduler and sockets; only the model is a fake, whose right tokens are known."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine_harness import EngineThread, collect, ids, params, tokens_of, until
from fake_executor import FakeExecutor, expected
from hybrid_serve.client import EngineRejected
from hybrid_serve.config import SchedulerConfig
from hybrid_serve.heartbeat import EnginePhase
from hybrid_serve.wire import FinishReason


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_gets_the_tokens_of_the_model_and_a_reason_at_the_end(tmp_path: Path, depth: int) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            outputs = await collect(client, [1, 2, 3], max_tokens=40, seed=5)
            assert tokens_of(outputs) == expected([1, 2, 3], 5, 40)
            assert [output.finish for output in outputs[:-1]] == [FinishReason.NONE] * 39
            assert outputs[-1].finish is FinishReason.LENGTH
            assert [output.cached_tokens for output in outputs] == [0] + [-1] * 39

    with EngineThread(tmp_path, FakeExecutor(depth=depth)) as engine:
        run(main(engine))


def test_a_second_request_with_the_same_beginning_says_what_it_found_in_the_cache(tmp_path: Path) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            prompt = list(range(100))
            await collect(client, prompt, max_tokens=2)
            outputs = await collect(client, prompt, max_tokens=5)
            assert outputs[0].cached_tokens == 96
            assert tokens_of(outputs) == expected(prompt, 1, 5)
            await until(lambda: client.engines[0].stats.prefix_hits == 96 and client.engines[0].stats.num_running == 0)

    with EngineThread(tmp_path) as engine:
        run(main(engine))


def test_choices_of_one_prompt_share_it_and_go_their_own_ways(tmp_path: Path) -> None:
    """S29: n > 1."""

    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            prompt = list(range(37))
            outputs = await collect(client, prompt, n=3, max_tokens=20, seed=11)
            for choice in range(3):
                assert tokens_of(outputs, choice) == expected(prompt, 11, 20, choice)

    with EngineThread(tmp_path) as engine:
        run(main(engine))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_host_blocks", [0, 200])
def test_64_streams_in_a_tiny_pool_are_all_right_although_they_preempt_each_other(
    tmp_path: Path, depth: int, num_host_blocks: int
) -> None:
    """F-19, and depth 1 = depth 2 token for token: both equal the reference; also with KV that is swapped (S47)."""

    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            prompts = [[7 * i + j for j in range(5 + i % 40)] for i in range(64)]
            prompts = [[token % 1000 for token in prompt] for prompt in prompts]
            results = await asyncio.gather(
                *(collect(client, prompt, max_tokens=60, seed=i) for i, prompt in enumerate(prompts))
            )
            for i, (prompt, outputs) in enumerate(zip(prompts, results, strict=True)):
                assert tokens_of(outputs) == expected(prompt, i, 60)
            await until(lambda: client.engines[0].stats.steps > 0 and client.engines[0].stats.num_running == 0)
            assert client.engines[0].stats.kv_blocks_used == 0
            assert client.engines[0].stats.num_preemptions > 5
            stats = client.engines[0].stats
            assert stats.host_blocks_total == num_host_blocks
            assert stats.host_blocks_used == stats.num_swapped == 0
            swapped = stats.blocks_swapped_out, stats.blocks_swapped_in
            assert min(swapped) > 5 if num_host_blocks else swapped == (0, 0)

    executor = FakeExecutor(num_blocks=24, depth=depth, num_host_blocks=num_host_blocks)
    with EngineThread(tmp_path, executor, scheduler=SchedulerConfig(max_num_seqs=32)) as engine:
        run(main(engine))


def test_log_probabilities_reach_the_requests_that_asked_for_them_and_no_other(tmp_path: Path) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client(0) as first, engine.client(1) as second:
            plain, one, three = await asyncio.gather(
                collect(first, [1], max_tokens=20),
                collect(second, [2], max_tokens=20, logprobs=0),
                collect(second, [3], max_tokens=20, logprobs=3),
            )
            assert all(output.logprobs == [] for output in plain)
            for output in one:
                token = output.token_ids[0]
                assert output.logprobs == [(0.0, token % 5 + 1, [])]
            for output in three:
                token = output.token_ids[0]
                assert output.logprobs == [(0.0, token % 5 + 1, [(token + i, -float(i)) for i in (1, 2, 3)])]

    with EngineThread(tmp_path, num_clients=2) as engine:
        run(main(engine))


def test_leaving_the_block_aborts_what_runs_within_200_ms(tmp_path: Path) -> None:
    """F-39."""

    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            async with client.generate(ids([1, 2]), params(4000), n=2) as stream:
                async for _ in stream:
                    if client.engines[0].stats.num_running == 2:
                        break
            loop = asyncio.get_running_loop()
            left = loop.time()
            await until(lambda: client.engines[0].stats.num_running == 0)  # an engine that becomes idle says so at once
            assert loop.time() - left < 0.2
            assert client.engines[0].stats.kv_blocks_used == 0
            assert engine.peers.live == [set()]
            assert tokens_of(await collect(client, [9], max_tokens=3)) == expected([9], 1, 3)

    with EngineThread(tmp_path, FakeExecutor(delay=0.005)) as engine:
        run(main(engine))


def test_a_cancelled_task_and_one_that_never_read_abort_as_well(tmp_path: Path) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            reading = asyncio.create_task(collect(client, [1, 2], max_tokens=4000))

            async def fail_inside() -> None:
                async with client.generate(ids([3]), params(4000)):
                    await until(lambda: client.engines[0].stats.num_running == 2)
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                await fail_inside()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await until(lambda: client.engines[0].stats.num_running == 0)

    with EngineThread(tmp_path, FakeExecutor(delay=0.005)) as engine:
        run(main(engine))


def test_one_choice_can_be_aborted_and_the_others_go_on(tmp_path: Path) -> None:
    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            after = False
            kept: list[int] = []
            async with client.generate(ids([5, 6]), params(60, seed=3), n=2) as stream:
                async for outputs in stream:
                    kept += tokens_of(outputs, 1)
                    assert not (after and tokens_of(outputs, 0))
                    if len(kept) >= 5 and not after:
                        stream.abort(0)
                        stream.abort(0)
                        after = True
            assert kept == expected([5, 6], 3, 60, choice=1)

    with EngineThread(tmp_path, FakeExecutor(delay=0.001)) as engine:
        run(main(engine))


def test_a_prompt_that_is_too_long_is_a_400_with_both_numbers(tmp_path: Path) -> None:
    """F-20, F-33."""

    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            with pytest.raises(EngineRejected, match=r"4096 tokens.*4096 tokens") as caught:
                await collect(client, [1] * 4096)
            assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
            outputs = await collect(client, [1] * 4095)
            assert outputs[-1].finish is FinishReason.LENGTH

    with EngineThread(tmp_path) as engine:
        run(main(engine))


@pytest.mark.parametrize(
    ("prompt", "changes", "names"),
    [
        ([], {}, "prompt is empty"),
        ([1000], {}, "1000"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"max_tokens": 2**63}, "max_tokens"),
        ([1], {"min_tokens": 2**40}, "min_tokens"),
        ([1], {"logprobs": 10_000}, "num_logprobs"),
        ([1], {"stop_token_ids": (2**31,)}, "2147483648, which is no token id"),
        ([1], {"logit_bias": {-1: 1.0}}, "logit_bias"),
    ],
)
def test_what_the_scheduler_refuses_is_a_400_and_the_engine_goes_on(
    tmp_path: Path, prompt: list[int], changes: dict[str, Any], names: str
) -> None:
    """ADV-17, 22, 24, 25, 27: one request never stops the engine."""

    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            with pytest.raises(EngineRejected, match=names) as caught:
                await collect(client, prompt, **changes)
            assert (caught.value.status, caught.value.code) == (400, "invalid_value")
            assert tokens_of(await collect(client, [1], max_tokens=3)) == expected([1], 1, 3)

    with EngineThread(tmp_path) as engine:
        run(main(engine))


def test_a_full_queue_is_a_503_at_once_and_those_before_finish(tmp_path: Path) -> None:
    """F-44."""

    async def main(engine: EngineThread) -> None:
        async with engine.client() as client:
            results = await asyncio.gather(
                *(collect(client, [i], max_tokens=30, seed=i) for i in range(20)), return_exceptions=True
            )
            refused = [result for result in results if isinstance(result, EngineRejected)]
            assert len(refused) == 12
            assert {(error.status, error.code) for error in refused} == {(503, "overloaded")}
            for i, result in enumerate(results):
                if not isinstance(result, BaseException):
                    assert tokens_of(result) == expected([i], i, 30)
            assert tokens_of(await collect(client, [1], max_tokens=3)) == expected([1], 1, 3)

    scheduler = SchedulerConfig(max_num_seqs=3, max_num_queued_reqs=5)
    with EngineThread(tmp_path, FakeExecutor(delay=0.002), scheduler=scheduler) as engine:
        run(main(engine))


def test_the_requests_of_an_api_server_that_is_gone_are_aborted_within_a_second(tmp_path: Path) -> None:
    """F-07. The other API server's stream goes on."""

    async def main(engine: EngineThread) -> None:
        async with engine.client(0) as stays, engine.client(1) as leaves:
            going = asyncio.create_task(collect(stays, [1], max_tokens=300))
            doomed = leaves.generate(ids([2, 3]), params(4000), n=2)
            await doomed.__aenter__()
            await until(lambda: stays.engines[0].stats.num_running == 3)
            leaves._dealers._context.destroy(linger=0)  # as if its process were gone: no ABORT is sent
            leaves._dealers._takers.clear()
            loop = asyncio.get_running_loop()
            left = loop.time()
            await until(lambda: stays.engines[0].stats.num_running == 1)
            assert loop.time() - left < 1
            assert tokens_of(await going) == expected([1], 1, 300)

    with EngineThread(tmp_path, FakeExecutor(delay=0.003), num_clients=2) as engine:
        run(main(engine))


def test_an_idle_engine_sleeps(tmp_path: Path) -> None:
    with EngineThread(tmp_path) as engine:
        time.sleep(0.05)  # start-up
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.05
        assert not engine.error


def test_while_there_is_nothing_to_do_the_executor_prepares_and_stops_at_once_for_a_request(tmp_path: Path) -> None:
    """P5: a piece at a time, in a phase of its own; with all of it done the engine sleeps."""
    executor, phases, done_before = FakeExecutor(), list[EnginePhase](), list[int]()
    is_served = threading.Event()
    executor.on_step = lambda batch: done_before.append(len(phases))

    async def main(engine: EngineThread) -> None:
        def piece() -> None:
            phases.append(engine.heartbeat.phase)
            is_served.wait(0.02)

        async with engine.client() as client:
            executor.preparations = [piece] * 500
            await until(lambda: len(phases) > 1)
            assert tokens_of(await collect(client, [1, 2, 3], max_tokens=5, seed=5)) == expected([1, 2, 3], 5, 5)
            is_served.set()
            await until(lambda: not executor.preparations and engine.heartbeat.phase is EnginePhase.IDLE)

    with EngineThread(tmp_path, executor) as engine:
        run(main(engine))
    assert phases == [EnginePhase.CAPTURE] * 500
    assert len(done_before) == 5
    assert 1 < done_before[0] == done_before[-1] < 500  # nothing is prepared while a request runs
