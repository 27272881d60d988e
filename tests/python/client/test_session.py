"""What a client makes of messages that came twice, late, cut, of another session or not at all (F-50)."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_harness import ids, params, until
from fake_server import FIRST_ID, FakeServer, with_server
from hybrid_serve.client import EngineRejected
from hybrid_serve.client.streams import ZmqStream
from hybrid_serve.session import Gap, NotNext, Session, Stamp, later_id, stamped
from hybrid_serve.wire import AddRequest, EngineStats, FinishReason, Kind, Reset, StepHeader, pack, unpack

NONE, STOP = FinishReason.NONE, FinishReason.STOP


def frames_of(message: list[bytes]) -> tuple[Stamp, list[bytes]]:
    return Stamp.of(message[0]), message[1:]


def test_a_session_takes_each_message_once_in_order_and_whole_and_ends_with_the_first_that_is_missing() -> None:
    ours, theirs = Session(5), Session(5)
    messages = [frames_of(ours.stamped([b"k", b"ab", b"c" * number])) for number in range(4)]
    theirs.take(*messages[0])
    with pytest.raises(NotNext, match="before"):
        theirs.take(*messages[0])
    theirs.take(*messages[1])
    with pytest.raises(NotNext, match="session 6"):
        theirs.take(*frames_of(stamped([b"k", b""], 6, 2)))
    with pytest.raises(Gap, match="3 came where 2 was due"):
        theirs.take(*messages[3])
    with pytest.raises(NotNext):  # also of what comes in order then
        theirs.take(*messages[2])
    cut = Session(5)
    with pytest.raises(Gap, match="1 bytes of 2"):
        cut.take(messages[0][0], [b"a"])
    with pytest.raises(NotNext, match="first frame of 3"):
        Stamp.of(b"abc")


def test_a_later_session_has_a_greater_number_also_where_the_clock_was_set_back() -> None:
    assert later_id(0) > 1 << 60  # of another process, an hour ago
    assert later_id(1 << 63) == (1 << 63) + 1


async def asked_again(server: FakeServer) -> AddRequest:
    assert (await server.receive(server.engines[0]))[1] == Kind.JOIN
    added = await server.receive(server.engines[0])
    assert added[1] == Kind.ADD
    return unpack(added[2], AddRequest)


async def tokens(stream: ZmqStream) -> list[int]:
    return [token async for turn in stream for output in turn for token in output.token_ids]


def test_a_token_that_comes_twice_or_of_another_session_counts_once(tmp_path: Path) -> None:
    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params()) as stream:
            await server.receive(server.engines[0])
            session, sent = server.sessions[server.engines[0]], list[list[bytes]]()
            server.send_raw = lambda frames, engine=0: sent.append(frames)  # type: ignore[method-assign]
            server.step([(0, 5, NONE)])
            server.step([(0, 6, STOP)])
            del server.send_raw
            stranger = stamped([Kind.STEP, *sent[0][1:]], session.id - 1, 0)
            for message in (stranger, sent[0], sent[0], stranger, sent[1]):
                server.send_raw(message)
            assert await tokens(stream) == [5, 6]
            assert server.client.group.num_replayed == 0

    with_server(tmp_path, test)


@pytest.mark.parametrize("how", ["missing", "cut", "reset", "nonsense"])
def test_after_a_loss_the_client_joins_again_and_asks_for_the_rest(how: str, tmp_path: Path) -> None:
    """With the tokens that came before it; those behind it come once more."""

    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params()) as stream:
            await server.receive(server.engines[0])
            session = server.sessions[server.engines[0]]
            server.step([(0, 5, NONE)])
            if how == "missing":
                session.stamped([Kind.STATS, b""])
                server.step([(0, 7, STOP)])
            elif how == "cut":
                message = session.stamped(pack(Kind.STATS, EngineStats()))
                server.send_raw([message[0], message[1][:-1]])
                server.step([(0, 7, STOP)])
            elif how == "reset":
                server.send_raw(stamped(pack(Kind.RESET, Reset(session.id + (1 << 62))), session.id, 0))
            else:
                server.send(pack(Kind.STEP, StepHeader(1, 2, 0), b"12345678", b"1234", b"0", b"1234"))
            again = await asked_again(server)
            assert (again.id, again.num_generated, again.is_replay, again.is_suspect) == (FIRST_ID, 1, True, False)
            later = server.sessions[server.engines[0]].id
            assert later > session.id + ((1 << 62) if how == "reset" else 0)
            server.send_raw(stamped(pack(Kind.RESET, Reset(session.id)), session.id, 0))  # of before: nobody minds
            server.step([(0, 6, STOP)])
            assert await tokens(stream) == [5, 6]
            assert server.client.group.num_replayed == 1

    with_server(tmp_path, test)


def test_a_request_that_is_lost_again_and_again_ends_with_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_serve.client.group.MOST_RESETS", 2)

    async def test(server: FakeServer) -> None:
        async with server.client.generate(ids([1]), params()) as stream:
            await server.receive(server.engines[0])
            for number in range(3):
                server.send(pack(Kind.STEP, StepHeader(1, 1, 0)))
                if number < 2:
                    await asked_again(server)
            with pytest.raises(EngineRejected, match="engine 0 were lost 3 times in a row") as caught:
                await tokens(stream)
            assert (caught.value.status, caught.value.code) == (503, "engine_dead")

    with_server(tmp_path, test)


def test_an_engine_that_works_for_us_is_asked_now_and_then_whether_we_count_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would notice that the last message is missing. Also one that gives what nobody wants any more."""
    monkeypatch.setattr("hybrid_serve.client.group.CHECK_SECONDS", 0.02)

    async def test(server: FakeServer) -> None:
        engine, link = server.engines[0], server.client.engines[0]
        assert not engine.poll(60)
        async with server.client.generate(ids([1]), params()):
            assert (await server.receive(engine))[1] == Kind.ADD
            assert (await server.receive(engine))[1] == Kind.CHECK
            assert (await server.receive(engine))[1] == Kind.CHECK
        kind = Kind.CHECK
        while kind == Kind.CHECK:
            kind = (await server.receive(engine))[1]
        assert kind == Kind.ABORT
        server.step([(0, 5, NONE)])
        assert (await server.receive(engine))[1] == Kind.CHECK
        await until(lambda: not link.is_unsure)
        assert not engine.poll(60)

    with_server(tmp_path, test)
