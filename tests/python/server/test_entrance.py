"""Who is let in to engines that several API servers have in common (F-44)."""

from __future__ import annotations

import pytest

from api_harness import says
from fake_engine import Call, FakeEngine
from hybrid_serve.client.open_counts import OpenCounts
from hybrid_serve.server.entrance import Entrance, Seat
from hybrid_serve.server.errors import ApiError
from hybrid_serve.server.metrics import Metrics
from hybrid_serve.shared_memory import OPEN_SLOT_BYTES
from hybrid_serve.wire import EngineStats, SamplingParams


@pytest.fixture
def memory() -> memoryview:
    """Three slots."""
    return memoryview(bytearray(3 * OPEN_SLOT_BYTES))


def entrance(memory: memoryview, index: int, may_wait: int = 3) -> Entrance:
    """Of an engine that may run one request, and does."""
    call = Call([1], SamplingParams(seed=0), 1, 0, (), b"", entered=True)
    engine = FakeEngine(says("one"), stats=EngineStats(may_run=1), calls=[call])
    return Entrance(engine, Metrics(), OpenCounts(memory, index), lambda: may_wait)


def test_what_another_api_server_has_let_in_counts_at_once(memory: memoryview) -> None:
    ours, theirs = entrance(memory, 0), entrance(memory, 1)
    ours.seat()
    ours.seat()
    assert not theirs.is_full()
    seat = theirs.seat()
    assert theirs.is_full()
    assert ours.is_full()
    with pytest.raises(ApiError, match="4 requests run or wait, 4 may"):
        ours.seat()
    seat.leave()
    assert not ours.is_full()


def test_of_two_api_servers_that_give_the_last_seat_away_at_the_same_moment_one_takes_it_back(
    memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = entrance(memory, 0, may_wait=1), entrance(memory, 1, may_wait=1)
    taken: list[Seat | None] = []
    enter = ours._enter

    def enter_at_the_same_moment(num: int) -> None:
        monkeypatch.setattr(ours, "_enter", enter)
        taken.append(theirs.seat_if_free())
        enter(num)

    monkeypatch.setattr(ours, "_enter", enter_at_the_same_moment)
    assert ours.seat_if_free() is None
    assert taken[0] is not None
    assert (ours.num_entering, theirs.num_entering) == (0, 1)


def test_a_seat_is_left_once_and_what_an_earlier_process_left_is_forgotten(memory: memoryview) -> None:
    ours, theirs = entrance(memory, 0), entrance(memory, 1)
    with ours.seat() as seat:
        seat.leave()
        assert ours.num_entering == 0
    assert ours.num_entering == 0
    for _ in range(3):
        theirs.seat()
    assert ours.is_full()
    OpenCounts(memory, 1).clear()  # it died and came back
    assert not ours.is_full()
