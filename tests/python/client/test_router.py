"""Which engine a request goes to: by load, in turn, by the beginning of its prompt (S12)."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

import pytest

from hybrid_serve.client import router as router_module
from hybrid_serve.client.link import Link
from hybrid_serve.client.open_counts import OpenCounts
from hybrid_serve.client.router import SHORTEST_PREFIX, Router
from hybrid_serve.client.streams import ZmqStream
from hybrid_serve.shared_memory import OPEN_SLOT_BYTES
from hybrid_serve.wire import AddRequest, EngineStats, SamplingParams


def prompt(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def test_the_least_loaded_engine_is_picked_and_equal_ones_take_turns() -> None:
    router = Router(has_affinity=False)
    assert router.pick({0: 3.0, 1: 2.5, 2: 9.0}, b"", b"") == 1
    assert Counter(router.pick({0: 1.0, 1: 1.0, 2: 2.0}, b"", b"") for _ in range(40)) == {0: 20, 1: 20}
    assert router.pick({5: 7.0}, b"", b"") == 5


def test_several_api_servers_do_not_all_begin_with_the_same_engine() -> None:
    first = [Router(False, turn).pick({0: 0.0, 1: 0.0, 2: 0.0}, b"", b"") for turn in range(3)]
    assert sorted(first) == [0, 1, 2]


def test_a_beginning_that_is_known_goes_where_it_went_and_the_longest_one_wins() -> None:
    """S12, prefix affinity."""
    router = Router(has_affinity=True)
    system, question = list(range(SHORTEST_PREFIX)), list(range(500, 500 + SHORTEST_PREFIX))
    assert router.pick({0: 0.0, 1: 1.0}, prompt(system), b"") == 0
    assert router.pick({0: 3.0, 1: 0.0}, prompt([*system, 1]), b"") == 0
    assert (
        router.pick({0: 9.0, 1: 0.0}, prompt([*system, *question]), b"") == 1
    )  # too much to do; it is known there now
    assert router.pick({0: 0.0, 1: 3.0}, prompt([*system, *question, 7]), b"") == 1
    assert router.pick({0: 9.0, 1: 8.0, 2: 0.0}, prompt([*system, 2]), b"") == 2


def test_short_prompts_other_salts_and_absent_engines_are_placed_by_load() -> None:
    router = Router(has_affinity=True)
    long, short = prompt(range(200)), prompt(range(SHORTEST_PREFIX - 1))
    assert router.pick({0: 0.0, 1: 1.0}, long, b"") == 0
    assert router.pick({0: 2.0, 1: 1.0}, long, b"salt") == 1
    assert router.pick({1: 9.0}, long, b"") == 1  # engine 0 is being restarted
    assert router.pick({0: 0.0, 1: 1.0}, short, b"") == 0
    assert router.pick({0: 2.0, 1: 1.0}, short, b"") == 1


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MOST_PREFIXES", 10)
    router = Router(has_affinity=True)
    for first in range(20):
        router.pick({first % 2: 0.0}, prompt([first] * SHORTEST_PREFIX), b"")
    assert router._prefixes is not None
    assert len(router._prefixes) == 10
    assert router.pick({0: 0.0, 1: 1.0}, prompt([19] * SHORTEST_PREFIX), b"") == 1
    assert router.pick({0: 0.0, 1: 1.0}, prompt([1] * SHORTEST_PREFIX), b"") == 0  # forgotten


def stream(first_id: int, n: int = 1) -> ZmqStream:
    return ZmqStream(AddRequest(first_id, n, 0, SamplingParams()), b"", lambda _: None, lambda *_: None)


def test_an_engine_whose_counts_would_be_those_of_another_api_server_is_none() -> None:
    with pytest.raises(ValueError, match="engine 4096 has no place, there are 4096"):
        Link(OPEN_SLOT_BYTES // 16, "inproc://nowhere", OpenCounts())


def test_the_load_of_an_engine_is_what_all_api_servers_have_there_at_this_moment() -> None:
    """What it has said itself may be older than an abort of ours."""
    memory = memoryview(bytearray(2 * OPEN_SLOT_BYTES))
    link, theirs = (Link(0, "inproc://nowhere", OpenCounts(memory, index)) for index in range(2))
    one, two = stream(10, n=2), stream(20, n=3)
    link.add(one, range(10, 12), 1024)
    assert link.load == 2 + 2  # two choices, and a prompt as dear as two more
    assert theirs.load == 2
    theirs.add(two, range(20, 23), 0)
    link.take_stats(EngineStats(num_running=50))
    assert link.load == 2 + 3 + 2
    link.started(one)
    link.remove(one, [10])
    assert link.load == theirs.load == 1 + 3
    link.take_stats(EngineStats(num_running=1, num_waiting=2, kv_blocks_used=100, kv_blocks_total=100))
    assert link.load == 1 + 3 + 6  # its cache is full: who waits there waits long
    assert link.take_all() == [one]
    assert link.load == theirs.load == 3
