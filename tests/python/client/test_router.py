"""Which engine a request goes to: by load, in turn, by the beginning of its prompt (S12)."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

import pytest

from hybrid_serve.client import router as router_module
from hybrid_serve.client.link import Link
from hybrid_serve.client.router import SHORTEST_PREFIX, Router
from hybrid_serve.client.streams import ZmqStream
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


def test_the_load_of_an_engine_is_ours_to_the_last_request_and_that_of_others_as_it_said() -> None:
    link = Link(0, "inproc://nowhere", 2)
    one = stream(10, n=2)
    link.add(one, range(10, 12), 1024)
    assert link.load == 2 + 2 + 2  # two choices, as many of the other API server, and a prompt as dear as two more
    link.take_stats(EngineStats(num_running=5, num_waiting=1))
    assert link.load == 4 + 4  # two of the six are ours
    link.started(one)
    link.remove(one, [10])
    assert link.load == 1 + 4
    link.take_stats(EngineStats(num_running=1, num_waiting=2, kv_blocks_used=100, kv_blocks_total=100))
    assert link.load == 1 + 2 + 6  # its cache is full: who waits there waits long
    assert link.take_all() == [one]
    assert link.load == 0
