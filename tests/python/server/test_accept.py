"""Several API servers accept from one socket: none takes all (S8)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trustme

from engine_harness import until
from hybrid_serve.server.accept import FairAcceptor
from hybrid_serve.server.shared_counts import SharedCounts
from hybrid_serve.shared_memory import COUNTS_SLOT_BYTES


@pytest.fixture
def memory() -> memoryview:
    """Three slots."""
    return memoryview(bytearray(3 * COUNTS_SLOT_BYTES))


class Greeting(asyncio.Protocol):
    """Says whose connection it is, and counts."""

    def __init__(self, index: int, num_open: Counter[int]) -> None:
        self._index, self._num_open = index, num_open

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._num_open[self._index] += 1
        transport.write(b"%d" % self._index)

    def connection_lost(self, exc: Exception | None) -> None:
        self._num_open[self._index] -= 1


def acceptor(listener: socket.socket, memory: memoryview, index: int, num_open: Counter[int]) -> FairAcceptor:
    shared = SharedCounts(memory, index)
    return FairAcceptor(
        listener, lambda: Greeting(index, num_open), shared, lambda: num_open[index], ssl=None, handshake_seconds=None
    )


@asynccontextmanager
async def burst(
    memory: memoryview, num: int
) -> AsyncIterator[tuple[FairAcceptor, Counter[int], Callable[[int], None]]]:
    """API server 0 with so many connections waiting, how many it has taken, and a function that makes more."""
    num_open: Counter[int] = Counter()
    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=num) as listener, listener.dup() as own:

        def come(num: int) -> None:
            clients.extend(socket.create_connection(listener.getsockname()) for _ in range(num))

        come(num)
        alone = acceptor(own, memory, 0, num_open)
        yield alone, num_open, come
        alone.close()
        for client in clients:
            client.close()
        await until(lambda: not any(num_open.values()))


def test_connections_are_shared_equally_and_who_lost_some_gets_the_next(memory: memoryview) -> None:
    async def main() -> None:
        num_open: Counter[int] = Counter()
        with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
            sockets = [listener.dup() for _ in range(3)]
            acceptors = [acceptor(each, memory, index, num_open) for index, each in enumerate(sockets)]
            clients = [await asyncio.open_connection(*listener.getsockname()) for _ in range(60)]
            who = [await reader.read(1) for reader, _ in clients]
            assert all(15 <= count <= 25 for count in Counter(who).values()), Counter(who)
            for (_, writer), server in zip(clients, who, strict=True):
                if server == b"1":
                    writer.close()
            await until(lambda: num_open[1] == 0)
            new = [await asyncio.open_connection(*listener.getsockname()) for _ in range(10)]
            assert Counter([await reader.read(1) for reader, _ in new])[b"1"] >= 8
            for one in acceptors:
                one.close()
            for _, writer in clients + new:
                writer.close()
            await until(lambda: not any(num_open.values()))
            for each in sockets:
                each.close()

    asyncio.run(main())


def test_nobody_waits_for_one_that_is_dead_or_whose_count_was_left_behind(memory: memoryview) -> None:
    """The others' slots say 0, or something old: every connection is taken in a moment all the same."""

    async def main() -> None:
        num_open: Counter[int] = Counter()
        SharedCounts(memory, 2).num_connections = 1000
        with socket.create_server(("127.0.0.1", 0)) as listener:
            own = listener.dup()
            alone = acceptor(own, memory, 0, num_open)
            began = asyncio.get_running_loop().time()
            clients = [await asyncio.open_connection(*listener.getsockname()) for _ in range(20)]
            assert [await reader.read(1) for reader, _ in clients] == [b"0"] * 20
            assert asyncio.get_running_loop().time() - began < 5
            alone.close()
            for _, writer in clients:
                writer.close()
            await until(lambda: not any(num_open.values()))
            own.close()

    asyncio.run(main())


def test_a_burst_waits_the_less_for_those_that_do_not_come_the_longer_it_lasts(
    memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-44: 300 connections of which two dead API servers should have had most are 25 moments' work, not 300."""
    moments: list[float] = []
    wait = FairAcceptor._wait

    def count_and_wait(self: FairAcceptor, seconds: float) -> None:
        moments.append(seconds)
        wait(self, seconds)

    monkeypatch.setattr(FairAcceptor, "_wait", count_and_wait)

    async def main() -> None:
        async with burst(memory, 300) as (alone, num_open, come):
            await until(lambda: num_open[0] == 300)
            assert 20 < len(moments) < 30
            await until(lambda: alone._num_moments == 0)
            moments.clear()
            come(3)
            await until(lambda: num_open[0] == 303)
            assert len(moments) in (2, 3), "who comes later is left to the others again"

    asyncio.run(main())


def test_a_burst_of_connections_is_accepted_in_a_few_turns_of_the_event_loop(memory: memoryview) -> None:
    """F-44: one a turn would let the last wait for as many turns, in each of which requests are worked on."""

    async def main() -> None:
        async with burst(memory[:COUNTS_SLOT_BYTES], 40) as (alone, num_open, _):
            turns, turns_behind = 0, 0
            while num_open[0] < 40:
                await asyncio.sleep(0)
                turns += 1
                turns_behind += alone.is_behind
            assert turns < 20
            assert turns_behind > 0
            await until(lambda: not alone.is_behind)

    asyncio.run(main())


def test_tls_is_spoken_and_who_does_not_speak_it_is_dropped(memory: memoryview) -> None:
    authority, num_open = trustme.CA(), Counter[int]()
    context, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(trusting)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            own, address = listener.dup(), listener.getsockname()
            alone = FairAcceptor(
                own, lambda: Greeting(0, num_open), SharedCounts(memory, 0), lambda: num_open[0], context, 5.0
            )
            plain_reader, plain = await asyncio.open_connection(*address)
            plain.write(b"GET / HTTP/1.1\r\n\r\n")
            reader, writer = await asyncio.open_connection(*address, ssl=trusting, server_hostname="localhost")
            assert await reader.read(1) == b"0"
            with contextlib.suppress(ConnectionError):
                await plain_reader.read()
            alone.close()
            for each in (plain, writer):
                each.close()
            await until(lambda: not any(num_open.values()))
            own.close()

    asyncio.run(main())


def test_counts_and_connections_share_a_slot_without_touching(memory: memoryview) -> None:
    shared = [SharedCounts(memory, index) for index in range(3)]
    for index, each in enumerate(shared):
        each.num_connections = 5 + index
        each.write({"a": [1.0] * 1000})
    assert [each.num_connections for each in shared] == [5, 6, 7]
    assert shared[2].mean_connections == 6
    assert shared[2].own() == {"a": [1.0] * 1000}
