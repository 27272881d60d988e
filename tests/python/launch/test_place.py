"""Which of several models goes when another is wanted (P9)."""

from __future__ import annotations

from itertools import count

import pytest

from hybrid_serve.config import Config
from hybrid_serve.launch.place import Place, to_put_away
from hybrid_serve.served import Budget, ServedModel
from hybrid_serve.wire import Status, Use

API = b"api-0"
_CLOCK = count(1)


def place(name: str, phase: str = "unloaded", memory: int = 0) -> Place:
    made = Place(ServedModel(name=name, config=Config(), memory=memory))
    made.phase, made.used_at = phase, float(next(_CLOCK))
    made.greet(API)
    return made


def names(places: list[Place] | None) -> list[str] | None:
    return None if places is None else [each.name for each in places]


def use(one: Place, *, is_open: bool = False, is_waited_for: bool = False, drain: int = 0) -> None:
    one.took(API, Use(one.name, is_open, is_waited_for, drain), float(next(_CLOCK)))


@pytest.fixture
def loaded() -> list[Place]:
    """Loaded one after the other."""
    return [place("a", "ready"), place("b", "ready")]


def test_the_one_unused_for_longest_goes(loaded: list[Place]) -> None:
    a, b = loaded
    wanted = place("c")
    assert names(to_put_away(wanted, [a, b, wanted], Budget(2))) == ["a"]
    use(a, is_open=True)
    use(a)
    assert names(to_put_away(wanted, [a, b, wanted], Budget(2))) == ["b"]
    assert names(to_put_away(wanted, [a, b, wanted], Budget(3))) == []
    assert names(to_put_away(wanted, [a, b, wanted], Budget())) == []


def test_one_in_use_goes_last_and_one_that_is_waited_for_not_at_all(loaded: list[Place]) -> None:
    a, b = loaded
    wanted = place("c")
    use(b, is_open=True)
    use(a, is_open=True)
    use(a)
    assert names(to_put_away(wanted, [a, b, wanted], Budget(1))) == ["a", "b"]
    use(a, is_waited_for=True)
    assert names(to_put_away(wanted, [a, b, wanted], Budget(2))) == ["b"]
    use(b, is_waited_for=True)
    assert to_put_away(wanted, [a, b, wanted], Budget(2)) is None


def test_what_is_being_loaded_stays_and_what_is_going_counts_as_gone(loaded: list[Place]) -> None:
    a, b = loaded
    wanted = place("c")
    a.phase = b.phase = "loading"
    assert to_put_away(wanted, [a, b, wanted], Budget(2)) is None
    a.phase = "ready"
    a.begin_drain()
    assert names(to_put_away(wanted, [a, b, wanted], Budget(2))) == []


def test_bytes_are_a_budget_too() -> None:
    small, other, large = place("small", "ready", 1), place("other", "ready", 1), place("large", memory=3)
    assert names(to_put_away(large, [small, other, large], Budget(0, 3))) == ["small", "other"]
    assert names(to_put_away(large, [small, other, large], Budget(0, 4))) == ["small"]
    assert names(to_put_away(large, [small, other, large], Budget(2, 100))) == ["small"]


def test_it_is_drained_when_every_api_server_has_said_so_of_this_drain() -> None:
    one = place("a", "ready")
    one.greet(b"api-1")
    use(one, is_open=True)
    one.begin_drain()
    use(one, is_open=True, drain=1)
    assert not one.is_drained
    use(one, drain=1)
    assert not one.is_drained, "the other API server may not know"
    one.took(b"api-1", Use("a", drain=1), 0.0)
    assert one.is_drained
    one.phase = "ready"
    one.begin_drain()
    assert not one.is_drained, "both have said so of the drain before"


def test_it_is_wanted_as_long_as_somebody_waits_in_the_order_of_coming() -> None:
    one = place("a")
    one.note_wanted(1.0)
    assert one.wanted_since is None
    one.took(API, Use("a", is_waited_for=True), 2.0)
    one.took(API, Use("a", is_waited_for=True), 3.0)
    assert one.wanted_since == 2.0
    one.took(API, Use("a"), 4.0)
    assert one.wanted_since is None


def test_facts_outlive_the_engine() -> None:
    one = place("a", "loading")
    assert not one.is_served
    one.said(Status("ready", engine=0))
    assert one.is_served
