"""What strangers and broken peers send: dropped, counted, and nobody else notices."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zmq

from engine_harness import EngineThread, collect, ids, params, tokens_of, until, wait_until
from fake_executor import FakeExecutor, expected
from hybrid_serve.session import Session, Stamp, stamped
from hybrid_serve.sockets import connect_dealer
from hybrid_serve.wire import (
    AddRequest,
    Empty,
    EngineStats,
    Join,
    Kind,
    Limit,
    Reject,
    Reset,
    api_identity,
    pack,
    unpack,
)

Send = Callable[..., None]


class RawPeer:
    """A socket that sends what it is told to; ``send`` stamps it as the next message."""

    def __init__(self, engine: EngineThread, identity: bytes, session: int = 1) -> None:
        self.context = zmq.Context()
        self.socket = connect_dealer(self.context, engine.data_address, identity)
        self.session = Session(session)

    def send(self, *frames: bytes) -> None:
        self.send_raw(*self.session.stamped(list(frames)))

    def send_raw(self, *frames: bytes) -> None:
        self.socket.send_multipart(list(frames))

    def receive(self) -> tuple[bytes, list[bytes]]:
        """Kind and frames behind it."""
        assert self.socket.poll(5000)
        first, *frames = self.socket.recv_multipart()
        return Stamp.of(first).kind, frames

    def close(self) -> None:
        self.context.destroy(linger=1000)


ADD = AddRequest(0, 1, 0, params())
BAD_MESSAGES: dict[str, list[bytes]] = {
    "nothing": [b""],
    "a stranger's kind": [b"\x99", b"\x90", b""],
    "a header alone": [Kind.ADD, b"\x90"],
    "no array": [Kind.ADD, msgspec.msgpack.encode(ADD)],
    "two arrays": [Kind.ADD, msgspec.msgpack.encode(ADD), b"", b""],
    "a header of garbage": [Kind.ADD, b"\xc1\xff\x00", ids([1])],
    "a header of another type": [Kind.ADD, msgspec.msgpack.encode({"id": 0}), ids([1])],
    "a header that is cut": [Kind.ADD, msgspec.msgpack.encode(ADD)[:-3], ids([1])],
    "a pickle": [Kind.ADD, b"\x80\x04\x95\x1a\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x94.", b""],
    "three bytes of ids": [Kind.ADD, msgspec.msgpack.encode(ADD), b"abc"],
    "another server's id": [Kind.ADD, msgspec.msgpack.encode(AddRequest(1 << 48, 1, 0, params())), ids([1])],
    "a negative id": [Kind.ADD, msgspec.msgpack.encode(AddRequest(-1, 1, 0, params())), ids([1])],
    "no choices": [Kind.ADD, msgspec.msgpack.encode(AddRequest(0, 0, 0, params())), ids([1])],
    "choices beyond the server's ids": [
        Kind.ADD,
        msgspec.msgpack.encode(AddRequest((1 << 48) - 1, 2, 0, params())),
        ids([1]),
    ],
    "an abort of half an id": [Kind.ABORT, msgspec.msgpack.encode(Empty()), b"1234"],
    "an abort of another's request": [Kind.ABORT, msgspec.msgpack.encode(Empty()), array("Q", [1 << 48]).tobytes()],
    "a negative limit": [Kind.LIMIT, msgspec.msgpack.encode(Limit(5, -1))],
    "a JOIN as somebody else": [Kind.JOIN, msgspec.msgpack.encode(Join(1))],
    "a JOIN beyond the plan": [Kind.JOIN, msgspec.msgpack.encode(Join(-1))],
}


def test_every_bad_message_is_dropped_and_counted_while_a_stream_runs(tmp_path: Path) -> None:
    """F-49, ADV-04."""

    async def main(engine: EngineThread) -> None:
        async with engine.client(1) as client:
            going = asyncio.create_task(collect(client, [1, 2, 3], max_tokens=200))
            await asyncio.sleep(0)
            bad = RawPeer(engine, api_identity(0))
            bad.send(*pack(Kind.JOIN, Join(0)))
            for message in BAD_MESSAGES.values():
                if len(message[0]) == 1:
                    bad.send(*message)
                else:
                    bad.send_raw(*message)
            stranger = RawPeer(engine, b"stranger")
            stranger.send(*pack(Kind.ADD, ADD, ids([1])))
            stranger.send(*pack(Kind.JOIN, Join(0)))
            generator = random.Random(3)
            for _ in range(200):
                stranger.send_raw(
                    *(generator.randbytes(generator.randrange(40)) for _ in range(generator.randrange(1, 6)))
                )
            assert tokens_of(await going) == expected([1, 2, 3], 1, 200)
            wait_until(lambda: engine.inbox.num_dropped == len(BAD_MESSAGES) + 202)
            wait_until(lambda: engine.peers.live == [set(), set()])
            bad.close()
            stranger.close()

    with EngineThread(tmp_path, FakeExecutor(delay=0.001), num_clients=2) as engine:
        asyncio.run(main(engine))


def test_a_frame_above_the_limit_costs_its_sender_the_connection_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-49: 1 GB frame; here against a smaller limit."""
    monkeypatch.setattr("hybrid_serve.sockets.MAX_FRAME_BYTES", 1 << 20)

    async def main(engine: EngineThread) -> None:
        async with engine.client(1) as client:
            bad = RawPeer(engine, api_identity(0))
            bad.send(*pack(Kind.JOIN, Join(0)))
            wait_until(lambda: engine.peers.num_joins == 2)
            bad.send(*pack(Kind.ADD, ADD, bytes(1 << 21)))
            assert tokens_of(await collect(client, [4], max_tokens=20)) == expected([4], 1, 20)
            wait_until(lambda: engine.peers.live == [set(), set()])
            bad.close()

    with EngineThread(tmp_path, num_clients=2) as engine:
        asyncio.run(main(engine))


def test_a_request_without_a_seed_or_with_an_id_in_use_is_refused_with_an_answer(tmp_path: Path) -> None:
    with EngineThread(tmp_path, FakeExecutor(delay=0.005)) as engine:
        peer = RawPeer(engine, api_identity(0))
        peer.send(*pack(Kind.JOIN, Join(0)))
        no_seed = msgspec.structs.replace(params(), seed=None)
        peer.send(*pack(Kind.ADD, AddRequest(7, 2, 0, no_seed), ids([1])))
        peer.send(*pack(Kind.ADD, AddRequest(9, 1, 0, params(4000)), ids([1])))
        peer.send(*pack(Kind.ADD, AddRequest(9, 1, 0, params()), ids([1])))
        rejects: list[Reject] = []
        while len(rejects) < 2:
            kind, (header, *_) = peer.receive()
            if kind == Kind.REJECT:
                rejects.append(unpack(header, Reject))
        assert [(reject.id, reject.n, reject.status) for reject in rejects] == [(7, 2, 400), (9, 1, 400)]
        assert "seed" in rejects[0].message
        assert "in use" in rejects[1].message
        assert engine.peers.live == [{9}]
        peer.close()


def test_an_api_server_that_joins_again_starts_from_nothing(tmp_path: Path) -> None:
    """A new process under the same index: what its predecessor ran is aborted (F-07)."""
    with EngineThread(tmp_path, FakeExecutor(delay=0.005)) as engine:
        first = RawPeer(engine, api_identity(0))
        first.send(*pack(Kind.JOIN, Join(0)))
        first.send(*pack(Kind.ADD, AddRequest(1, 1, 0, params(4000)), ids([1])))
        wait_until(lambda: engine.peers.live == [{1}])
        first.close()
        second = RawPeer(engine, api_identity(0), session=2)
        second.send(*pack(Kind.JOIN, Join(0)))
        wait_until(lambda: engine.peers.live == [set()])
        second.send(*pack(Kind.ADD, AddRequest(1, 1, 0, params(3)), ids([1])))
        kinds: list[bytes] = []
        while kinds.count(Kind.STEP) < 3:
            kinds.append(second.receive()[0])
        second.close()


def test_a_message_that_comes_twice_counts_once_and_one_that_is_missing_ends_the_session_with_an_answer(
    tmp_path: Path,
) -> None:
    """F-50: what was open is aborted, for its sender asks for it again; neither is taken for something else."""
    with EngineThread(tmp_path, FakeExecutor(delay=0.005)) as engine:
        peer = RawPeer(engine, api_identity(0), session=7)
        peer.send(*pack(Kind.JOIN, Join(0)))
        add = peer.session.stamped(pack(Kind.ADD, AddRequest(1, 1, 0, params(4000)), ids([1])))
        earlier = stamped(pack(Kind.JOIN, Join(0)), 6, 0)
        for message in (add, add, stamped(pack(Kind.JOIN, Join(0)), 7, 0), earlier):
            peer.send_raw(*message)
        wait_until(lambda: engine.inbox.num_dropped == 3)
        assert (engine.peers.live, engine.peers.num_joins) == ([{1}], 1)
        resets = [(6, 7)]  # the earlier one is told which session runs
        peer.session.stamped(pack(Kind.ABORT, Empty(), ids([])))  # lost
        for _ in range(2):
            peer.send(*pack(Kind.CHECK, Empty()))
            resets.append((7, 7))
        wait_until(lambda: engine.peers.live == [set()])
        while resets:
            assert peer.socket.poll(5000)
            first, *frames = peer.socket.recv_multipart()
            if Stamp.of(first).kind == Kind.RESET:
                assert (Stamp.of(first).session, unpack(frames[0], Reset).latest) == resets.pop(0)
        peer.session = Session(8)
        peer.send(*pack(Kind.JOIN, Join(0)))
        peer.send(*pack(Kind.ADD, AddRequest(1, 1, 0, params(3)), ids([1])))
        kinds = [peer.receive()[0] for _ in range(4)]
        assert kinds.count(Kind.STEP) >= 2
        peer.close()


def test_a_prompt_that_was_cut_is_not_run(tmp_path: Path) -> None:
    """F-50: four bytes less are a prompt, too."""
    with EngineThread(tmp_path) as engine:
        peer = RawPeer(engine, api_identity(0))
        peer.send(*pack(Kind.JOIN, Join(0)))
        *frames, tokens = peer.session.stamped(pack(Kind.ADD, AddRequest(1, 1, 0, params(3)), ids([1, 2])))
        peer.send_raw(*frames, tokens[:4])
        kind = Kind.STATS
        while kind == Kind.STATS:
            kind, _ = peer.receive()
        assert kind == Kind.RESET
        peer.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_asked_for_again_at_once_is_not_in_the_way_of_itself(depth: int, tmp_path: Path) -> None:
    """F-50: by the same ids, while a step under way still has them, of a choice that has finished, too."""
    with EngineThread(tmp_path, FakeExecutor(delay=0.002, depth=depth)) as engine:
        peer = RawPeer(engine, api_identity(0))
        for session in range(1, 30):
            peer.session = Session(session)
            peer.send(*pack(Kind.JOIN, Join(0)))
            peer.send(*pack(Kind.ADD, AddRequest(1, 1, 0, params(3)), ids([1])))
            num_steps = 0
            while num_steps < session % 4:
                kind, _ = peer.receive()
                assert kind != Kind.REJECT
                num_steps += kind == Kind.STEP
        assert engine.inbox.num_dropped == 0
        peer.close()


def test_a_check_is_answered_with_statistics(tmp_path: Path) -> None:
    with EngineThread(tmp_path) as engine:
        peer = RawPeer(engine, api_identity(0))
        peer.send(*pack(Kind.JOIN, Join(0)))
        for _ in range(3):
            assert peer.receive()[0] == Kind.STATS
            peer.send(*pack(Kind.CHECK, Empty()))
        peer.close()


def test_statistics_come_on_joining_and_on_becoming_idle_and_not_in_every_step(tmp_path: Path) -> None:
    with EngineThread(tmp_path) as engine:
        peer = RawPeer(engine, api_identity(0))
        peer.send(*pack(Kind.JOIN, Join(0)))
        kind, (header,) = peer.receive()
        assert (kind, unpack(header, EngineStats).kv_blocks_total) == (Kind.STATS, 256)
        peer.send(*pack(Kind.ADD, AddRequest(1, 1, 0, params(300)), ids([1])))
        messages: list[tuple[bytes, list[bytes]]] = []
        while not messages or messages[-1][0] != Kind.STATS or unpack(messages[-1][1][0], EngineStats).num_running:
            messages.append(peer.receive())
        kinds = [message[0] for message in messages]
        assert kinds.count(Kind.STEP) == 300
        last = unpack(messages[-1][1][0], EngineStats)
        assert (last.steps, last.step_tokens, last.kv_blocks_used) == (300, 300, 0)
        assert sum(last.step_gap_counts) == 299, "gaps between the steps"
        assert last.step_gap_us > 0
        assert kinds.count(Kind.STATS) <= 10  # 4 a second, and this took far less than 2
        peer.close()


def test_an_api_server_that_never_reads_does_not_slow_the_engines_steps(tmp_path: Path) -> None:
    """ADV-03: what it does not take waits outside of the step. It has requests of its own, and reads at times, so that
    steps with and without a reader are of the same run."""
    times: list[float] = []
    spans: dict[bool, list[float]] = {True: [], False: []}

    async def main(engine: EngineThread) -> None:
        async with engine.client(1) as client:
            other = RawPeer(engine, api_identity(0))
            other.send(*pack(Kind.JOIN, Join(0)))
            for id in range(4):
                other.send(*pack(Kind.ADD, AddRequest(id, 1, 0, params(4000)), ids([1])))
            await until(lambda: len(engine.peers.live[0]) == 4)
            going = asyncio.create_task(collect(client, [1, 2], max_tokens=1300))
            for phase in range(8):
                is_read = phase % 2 == 0
                while is_read and other.socket.poll(0):
                    other.socket.recv_multipart()
                begin = len(times)
                while len(times) < begin + 130:
                    await asyncio.sleep(0.001)
                    while is_read and other.socket.poll(0):
                        other.socket.recv_multipart()
                spans[is_read] += [(times[at + 50] - times[at]) / 50 for at in range(begin, begin + 100, 50)]
            assert tokens_of(await going) == expected([1, 2], 1, 1300)
            other.close()

    # Thread time, not the clock: the machine may have other things to do.
    executor = FakeExecutor(on_step=lambda batch: times.append(time.thread_time()))
    with EngineThread(tmp_path, executor, num_clients=2) as engine:
        asyncio.run(main(engine))
    assert statistics.median(spans[False]) < 1.3 * statistics.median(spans[True]), spans  # 0.8 to 1.0
