"""Several engines, one client, hand-made frames: who gets what, and what becomes of it when one is lost (S12, F-09)."""

from __future__ import annotations

from array import array
from pathlib import Path

import msgspec
import pytest

from engine_harness import ids, params, until
from fake_server import FIRST_ID, FakeServer, ids_of, with_server
from hybrid_serve.client import ChoiceOutput, EngineDead, EngineRejected
from hybrid_serve.client.open_counts import OpenCounts
from hybrid_serve.wire import (
    ALL_ENGINES,
    AddRequest,
    EngineFacts,
    FinishReason,
    Kind,
    Status,
    pack,
    unpack,
)

FACTS = EngineFacts(1000, 512, 16, 64, "float32", "cpu")


async def tell(server: FakeServer, *statuses: Status) -> None:
    for status in statuses:
        server.tell(pack(Kind.STATUS, status))
    last = statuses[-1]
    await until(lambda: server.client.engines[last.engine].status.phase == last.phase)


def ready(engine: int, restarts: int = 0, facts: EngineFacts = FACTS) -> Status:
    return Status("ready", engine=engine, restarts=restarts, facts=facts)


async def added(server: FakeServer, engine: int) -> AddRequest:
    frames = await server.receive(server.engines[engine])
    assert frames[1] == Kind.ADD
    return unpack(frames[2], AddRequest)


def test_it_is_ready_when_each_engine_has_been_and_stays_so_while_one_is(tmp_path: Path) -> None:
    """S9, F-09: with what the smaller of them can do."""

    async def test(server: FakeServer) -> None:
        client = server.client
        await tell(server, Status("loading_weights", 0.5, engine=1), ready(0))
        assert (client.status.phase, client.status.progress, client.facts) == ("loading_weights", 0.5, None)
        await tell(server, ready(1, facts=msgspec.structs.replace(FACTS, max_model_len=256)))
        assert client.status.phase == "ready"
        assert client.facts is not None
        assert client.facts.max_model_len == 256
        await tell(server, Status("restarting", engine=0, restarts=1))
        assert (client.status.phase, client.status.engine) == ("ready", 1)
        await tell(server, Status("not_responding", engine=1))
        assert client.status.phase == "restarting"
        await tell(server, Status("dead", engine=0, restarts=1))
        assert client.status.phase == "not_responding"

    with_server(tmp_path, test, num_engines=2)


def test_requests_of_an_engine_that_died_go_on_at_once_on_the_other_which_knows_the_suspects(tmp_path: Path) -> None:
    """F-09."""

    async def test(server: FakeServer) -> None:
        told: list[tuple[int, int, int]] = []
        server.client.group.on_replay = lambda *counts: told.append(counts)
        await tell(server, ready(0), ready(1))
        first, second = (server.client.generate(ids([number]), params(9)) for number in (1, 2))
        async with first, second:
            victim = 0 if first.engine == 0 else 1
            assert second.engine == 1 - victim
            await added(server, victim)
            await added(server, 1 - victim)
            server.step([(0, 5, FinishReason.NONE)], engine=victim)
            assert await anext(first) == [ChoiceOutput(0, [5])]
            lost = Status("restarting", engine=victim, restarts=1, suspects=ids_of(FIRST_ID))
            await tell(server, lost)
            frames = await server.receive(server.engines[1 - victim])
            again = unpack(frames[2], AddRequest)
            assert (again.id, again.num_generated, again.is_suspect, frames[3]) == (FIRST_ID, 1, True, ids([1, 5]))
            assert first.engine == 1 - victim
            server.step([(0, 6, FinishReason.STOP)], engine=1 - victim)
            assert [turn async for turn in first] == [[ChoiceOutput(0, [6], FinishReason.STOP)]]
            assert told == [(victim, 1, 0)]
            late = server.client.generate(ids([3]), params())
            async with late:  # and nobody is sent to the dead one
                assert late.engine == 1 - victim
            await added(server, 1 - victim)

    with_server(tmp_path, test, num_engines=2)


def test_where_no_engine_is_ready_requests_wait_for_the_one_that_takes_its_place(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        await tell(server, ready(0), Status("dead", engine=1, facts=FACTS))
        async with server.client.generate(ids([1]), params()):
            await added(server, 0)
            await tell(server, Status("restarting", engine=0, restarts=1))
            assert (await server.receive(server.engines[0]))[1] == Kind.JOIN
            assert (await added(server, 0)).is_replay
            assert server.engines[1].poll(0)  # it is connected again, and joined only
            assert (await server.receive(server.engines[1]))[1] == Kind.JOIN
            assert not server.engines[1].poll(50)

    with_server(tmp_path, test, num_engines=2)


def test_when_all_engines_are_given_up_everything_fails_with_the_cause(tmp_path: Path) -> None:
    """F-03. Nothing is moved about before."""

    async def test(server: FakeServer) -> None:
        await tell(server, ready(0), ready(1))
        async with server.client.generate(ids([1]), params()) as one, server.client.generate(ids([2]), params()) as two:
            server.tell(pack(Kind.STATUS, Status("dead", message="engine 1 died", engine=ALL_ENGINES)))
            for stream in (one, two):
                with pytest.raises(EngineDead, match="engine 1 died"):
                    await anext(stream)
        assert server.client.status.phase == "dead"

    with_server(tmp_path, test, num_engines=2)


def test_a_request_may_name_its_engine_and_is_refused_while_that_one_is_not_ready(tmp_path: Path) -> None:
    """S12, X-data-parallel-rank."""

    async def test(server: FakeServer) -> None:
        await tell(server, ready(0), ready(1))
        streams = [server.client.generate(ids([1]), params(), rank=1) for _ in range(5)]
        for stream in streams:
            async with stream:
                assert stream.engine == 1
                await added(server, 1)
            assert (await server.receive(server.engines[1]))[1] == Kind.ABORT
        await tell(server, Status("restarting", engine=1, restarts=1))
        async with server.client.generate(ids([1]), params(), rank=1) as stream:
            with pytest.raises(EngineRejected, match="Engine 1") as caught:
                await anext(stream)
            assert (caught.value.status, caught.value.code) == (503, "engine_restarting")

    with_server(tmp_path, test, num_engines=2)


def test_an_engine_with_long_jobs_of_other_api_servers_gets_fewer_new_ones(tmp_path: Path) -> None:
    """S12."""

    async def test(server: FakeServer) -> None:
        await tell(server, ready(0), ready(1))
        OpenCounts(server.open_memory, 0).set_in_engine(0, 6)
        streams = [await server.client.generate(ids([1]), params()).__aenter__() for _ in range(10)]
        assert [stream.engine for stream in streams[:6]] == [1] * 6
        assert [stream.engine for stream in streams].count(1) == 8
        for stream in streams:
            await stream.__aexit__()

    with_server(tmp_path, test, num_engines=2)


def test_an_abort_goes_to_the_engine_that_has_the_request_now(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        await tell(server, ready(0), ready(1))
        async with server.client.generate(ids([1]), params(), rank=0):
            await added(server, 0)
            await tell(server, Status("restarting", engine=0, restarts=1))
            await added(server, 1)
        assert (await server.receive(server.engines[1]))[1:] == [
            Kind.ABORT,
            b"\x90",
            array("Q", [FIRST_ID]).tobytes(),
        ]
        assert all(not engine.streams for engine in server.client.engines)

    with_server(tmp_path, test, num_engines=2)
