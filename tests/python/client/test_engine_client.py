"""The client against hand-made frames: what an engine could send, also what it should not."""

from __future__ import annotations

import asyncio
from array import array
from pathlib import Path

import pytest

from engine_harness import ids, params, until
from fake_server import FIRST_ID, FakeServer, ids_of, with_server
from hybrid_serve.client import ChoiceOutput, EngineDead, EngineRejected, TokenLogprobs
from hybrid_serve.client.steps import outputs_of_step
from hybrid_serve.wire import (
    AddRequest,
    Empty,
    EngineFacts,
    EngineStats,
    FinishReason,
    Kind,
    Limit,
    Reject,
    Status,
    StepHeader,
    pack,
    unpack,
)


def test_outputs_of_several_messages_arrive_in_order_and_a_slow_reader_gets_them_at_once(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params(), n=2) as stream:
            added = await server.receive(server.engines[0])
            assert (unpack(added[2], AddRequest).id, added[3]) == (FIRST_ID, ids([1]))
            server.step([(0, 10, FinishReason.NONE), (1, 20, FinishReason.NONE)])
            server.step([(0, 11, FinishReason.STOP), (1, 21, FinishReason.NONE)])
            server.step([(1, 22, FinishReason.LENGTH)])
            server.send(pack(Kind.STATS, EngineStats(num_running=9)))
            await until(lambda: server.client.engines[0].stats.num_running == 9)
            assert [turn async for turn in stream] == [
                [
                    ChoiceOutput(0, [10]),
                    ChoiceOutput(1, [20]),
                    ChoiceOutput(0, [11], FinishReason.STOP),
                    ChoiceOutput(1, [21]),
                    ChoiceOutput(1, [22], FinishReason.LENGTH),
                ]
            ]
        assert not server.engines[0].poll(50)  # nothing runs: no ABORT

    with_server(tmp_path, test)


def test_only_the_choices_that_still_run_are_aborted_and_late_outputs_are_dropped(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params(), n=3) as stream:
            await server.receive(server.engines[0])
            server.step([(0, 1, FinishReason.STOP), (1, 2, FinishReason.NONE), (2, 3, FinishReason.NONE)])
            assert len(await anext(stream)) == 3
            stream.abort(1)
            aborted = await server.receive(server.engines[0])
            assert aborted[1:] == [Kind.ABORT, pack(Kind.ABORT, Empty())[1], array("Q", [FIRST_ID + 1]).tobytes()]
            server.step([(1, 9, FinishReason.NONE), (2, 4, FinishReason.NONE)])
            assert await anext(stream) == [ChoiceOutput(2, [4])]
        aborted = await server.receive(server.engines[0])
        assert aborted[3] == array("Q", [FIRST_ID + 2]).tobytes()

    with_server(tmp_path, test)


def test_a_reject_is_raised_to_its_stream_alone(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        refused = server.client.generate(ids([1]), params(), n=2)
        taken = server.client.generate(ids([2]), params())
        async with refused, taken:
            server.send(pack(Kind.REJECT, Reject(FIRST_ID, 2, 400, "too long", "context_length_exceeded", "prompt")))
            server.step([(2, 5, FinishReason.STOP)])
            with pytest.raises(EngineRejected, match="too long") as caught:
                await anext(refused)
            assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
            assert [turn async for turn in taken] == [[ChoiceOutput(0, [5], FinishReason.STOP)]]

    with_server(tmp_path, test)


def test_a_dead_engine_fails_the_open_streams_after_what_has_arrived_and_every_new_one(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params()) as stream:
            server.step([(0, 5, FinishReason.NONE)])
            server.send(pack(Kind.STATS, EngineStats(steps=1)))
            await until(lambda: server.client.engines[0].stats.steps == 1)
            server.tell(pack(Kind.STATUS, Status("dead", message="engine 0 died")))
            await until(lambda: server.client.status.phase == "dead")
            assert await anext(stream) == [ChoiceOutput(0, [5])]
            with pytest.raises(EngineDead, match="engine 0 died"):
                await anext(stream)
        async with server.client.generate(ids([1]), params()) as late:
            with pytest.raises(EngineDead, match="engine 0 died"):
                await anext(late)

    with_server(tmp_path, test)


async def joined_again(server: FakeServer) -> None:
    assert (await server.receive(server.engines[0]))[1] == Kind.JOIN


def test_after_an_engines_death_each_choice_goes_on_behind_what_it_has_received(tmp_path: Path) -> None:
    """F-01: the same id, seed and limits; which part of the tokens is the request's own is said."""

    async def test(server: FakeServer) -> None:
        asked = params(50, min_tokens=9)
        async with server.client.generate(ids([1, 2]), asked, n=3, priority=4, cache_salt=b"x") as stream:
            original = unpack((await server.receive(server.engines[0]))[2], AddRequest)
            server.step([(0, 10, FinishReason.NONE), (1, 20, FinishReason.STOP)])
            server.step([(0, 11, FinishReason.NONE)])
            assert len(await anext(stream)) >= 2
            await until(lambda: stream._received[0].tolist() == [10, 11])
            server.tell(pack(Kind.STATUS, Status("restarting", restarts=1, suspects=ids_of(FIRST_ID, FIRST_ID + 1))))
            await joined_again(server)
            added = [await server.receive(server.engines[0]) for _ in range(2)]
            first, third = (unpack(frames[2], AddRequest) for frames in added)
            assert [frames[3] for frames in added] == [ids([1, 2, 10, 11]), ids([1, 2])]
            assert (first.id, first.n, first.num_generated, first.first_choice) == (FIRST_ID, 1, 2, 0)
            assert (third.id, third.n, third.num_generated, third.first_choice) == (FIRST_ID + 2, 1, 0, 2)
            assert (first.is_replay, first.is_suspect, third.is_replay, third.is_suspect) == (True, True, True, False)
            for again in (first, third):
                assert (again.params, again.priority, again.cache_salt) == (asked, 4, b"x")
            assert not original.is_replay
            assert server.client.group.num_replayed == 1

    with_server(tmp_path, test)


def test_a_request_of_which_nothing_came_is_asked_for_as_it_was(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1, 2]), params(), n=3):
            original = unpack((await server.receive(server.engines[0]))[2], AddRequest)
            server.tell(pack(Kind.STATUS, Status("restarting", restarts=1, suspects=ids_of(FIRST_ID))))
            await joined_again(server)
            frames = await server.receive(server.engines[0])
            again = unpack(frames[2], AddRequest)
            assert (again.id, again.n, again.is_suspect, frames[3]) == (original.id, 3, True, ids([1, 2]))

    with_server(tmp_path, test)


def test_what_the_dead_engine_had_sent_and_nobody_read_is_not_taken_twice(tmp_path: Path) -> None:
    """The old socket goes with what is in it; the same status told again replays nothing."""

    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params()) as stream:
            await server.receive(server.engines[0])
            restarting = pack(Kind.STATUS, Status("restarting", restarts=1))
            # Both wait for the client when it looks next; whichever it reads first, the token comes once.
            server.tell(restarting)
            server.step([(0, 5, FinishReason.NONE)])
            await joined_again(server)
            own = unpack((await server.receive(server.engines[0]))[2], AddRequest).num_generated
            server.step([(0, token, FinishReason.NONE) for token in (5, 6)[own:]])
            server.tell(restarting)
            server.step([(0, 7, FinishReason.STOP)])
            assert [output.token_ids for turn in [turn async for turn in stream] for output in turn] == [[5], [6], [7]]
            assert server.client.group.num_replayed == 1

    with_server(tmp_path, test)


def test_the_culprit_fails_alone(tmp_path: Path) -> None:
    """F-02: with all its choices; it is not sent again."""

    async def test(server: FakeServer) -> None:
        told: list[tuple[int, int, int]] = []
        server.client.group.on_replay = lambda *counts: told.append(counts)
        culprit, innocent = server.client.generate(ids([1]), params(), n=2), server.client.generate(ids([2]), params())
        async with culprit, innocent:
            for _ in range(2):
                await server.receive(server.engines[0])
            both = ids_of(FIRST_ID + 1, FIRST_ID + 2)
            lost = Status("restarting", restarts=2, suspects=both, culprits=ids_of(FIRST_ID + 1))
            server.tell(pack(Kind.STATUS, lost))
            with pytest.raises(EngineRejected) as caught:
                await anext(culprit)
            assert (caught.value.status, caught.value.code) == (500, "request_quarantined")
            await joined_again(server)
            assert unpack((await server.receive(server.engines[0]))[2], AddRequest).id == FIRST_ID + 2
            assert (server.client.group.num_replayed, server.client.group.num_quarantined) == (1, 1)
            assert told == [(0, 1, 1)]

    with_server(tmp_path, test)


def test_an_engine_that_takes_over_is_told_changed_limits(tmp_path: Path) -> None:
    """P19: it was started with the configuration's."""

    async def test(server: FakeServer) -> None:
        server.client.limit(7, 2)
        assert (await server.receive(server.engines[0]))[1] == Kind.LIMIT
        server.tell(pack(Kind.STATUS, Status("restarting", restarts=1)))
        await joined_again(server)
        frames = await server.receive(server.engines[0])
        assert (frames[1], unpack(frames[2], Limit)) == (Kind.LIMIT, Limit(7, 2))

    with_server(tmp_path, test)


def test_a_refused_replay_of_one_choice_ends_the_others_in_the_engine(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params(), n=2) as stream:
            await server.receive(server.engines[0])
            server.step([(0, 5, FinishReason.NONE)])
            assert await anext(stream)
            server.tell(pack(Kind.STATUS, Status("restarting", restarts=1)))
            await joined_again(server)
            for _ in range(2):
                await server.receive(server.engines[0])
            server.send(pack(Kind.REJECT, Reject(FIRST_ID, 1, 400, "smaller now", "context_length_exceeded")))
            with pytest.raises(EngineRejected, match="smaller now"):
                await anext(stream)
            assert (await server.receive(server.engines[0]))[3] == ids_of(FIRST_ID + 1)

    with_server(tmp_path, test)


def test_a_reader_that_waits_is_woken_when_the_client_closes(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        stream = await server.client.generate(ids([1]), params()).__aenter__()
        waiting = asyncio.ensure_future(anext(stream))
        await server.receive(server.engines[0])
        server.client.group.fail_all(EngineDead("the client was closed"))
        with pytest.raises(EngineDead):
            await waiting

    with_server(tmp_path, test)


def test_status_facts_and_shutdowns_are_passed_on(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        phases: list[str] = []
        shutdowns: list[bool] = []
        server.client.on_status = lambda status: phases.append(status.phase)
        server.client.on_shutdown = shutdowns.append
        assert server.client.facts is None
        facts = EngineFacts(100, 200, 16, 300, "bfloat16", "cpu")
        server.tell(pack(Kind.STATUS, Status("loading_weights", 0.5)))
        server.tell(pack(Kind.STATUS, Status("ready", facts=facts)))
        server.tell(pack(Kind.STATUS, Status("draining")))
        server.tell(pack(Kind.SHUTDOWN, Empty()))
        server.tell(pack(Kind.SHUTDOWN, Empty()))
        await until(lambda: len(shutdowns) == 2)
        assert phases == ["loading_weights", "ready", "draining"]
        assert server.client.facts == facts
        assert shutdowns == [False, True]

    with_server(tmp_path, test)


def test_broken_frames_from_the_engine_end_nothing(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params()) as stream:
            await server.receive(server.engines[0])
            server.send_raw([b"\x77", b""])
            server.send_raw([Kind.STEP])
            server.send_raw([Kind.STEP, b"\xc1"])
            server.step([(0, 5, FinishReason.STOP)])
            assert [turn async for turn in stream] == [[ChoiceOutput(0, [5], FinishReason.STOP)]]

    with_server(tmp_path, test)


def test_two_engines_share_the_requests(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        first, second = (server.client.generate(ids([1]), params()) for _ in range(2))
        async with first, second:
            for engine in server.engines:
                assert (await server.receive(engine))[1] == Kind.ADD
            server.send(pack(Kind.STATS, EngineStats(num_running=1, steps=10, step_token_counts=(1, 2))), engine=0)
            server.send(pack(Kind.STATS, EngineStats(num_running=2, steps=20, step_token_counts=(3, 4))), engine=1)
            await until(lambda: [engine.stats.steps for engine in server.client.engines] == [10, 20])

    with_server(tmp_path, test, num_engines=2)


def test_log_probabilities_are_cut_by_row() -> None:
    columns = [
        array("Q", [7, 8, 9]).tobytes(),
        array("i", [70, 80, 90]).tobytes(),
        bytes([0, 0, 1]),
        array("i", [-1, 4, -1]).tobytes(),
        array("i", [0, 2, 0]).tobytes(),
        array("q", [-1, 3_000_000, -1]).tobytes(),
        array("f", [-0.5, -0.5, -1.0, 0, 0, 0, -2.0, 0, 0]).tobytes(),
        array("i", [70, 70, 71, -1, -1, -1, 90, -1, -1]).tobytes(),
        array("i", [1, 0, 5]).tobytes(),
    ]
    found = list(outputs_of_step(StepHeader(1, 3, 3, now=5_500_000), columns))
    assert [id for id, _ in found] == [7, 8, 9]
    assert found[0][1].logprobs == [TokenLogprobs(-0.5, 1, [(70, -0.5), (71, -1.0)])]
    assert found[1][1] == ChoiceOutput(0, [80], FinishReason.NONE, 4, [], 2, 2.5)
    assert found[2][1].logprobs == [TokenLogprobs(-2.0, 5, [])]


def test_a_seed_is_needed_and_a_prompt_that_no_frame_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_serve.client.group.MAX_FRAME_BYTES", 8)

    async def test(server: FakeServer) -> None:
        with pytest.raises(ValueError, match="seed"):
            server.client.generate(ids([1]), params(seed=None))  # type: ignore[arg-type]
        async with server.client.generate(ids([1, 2, 3]), params()) as stream:
            with pytest.raises(EngineRejected, match="3 tokens"):
                await anext(stream)

    with_server(tmp_path, test)
