"""Who is tried after an engine's death, and when it has passed (F-02)."""

from __future__ import annotations

from array import array

from engine_harness import params
from hybrid_serve.engine.probation import STEPS, Probation, Suspect
from hybrid_serve.wire import AddRequest


class Court:
    """A Probation whose words are kept."""

    def __init__(self, *suspects: Suspect) -> None:
        self.on_trial: list[list[int]] = []
        self.probation = Probation(lambda ids: self.on_trial.append(array("Q", ids).tolist()))
        for one in suspects:
            self.probation.hold(one)


def suspect(id: int, n: int = 1) -> Suspect:
    return Suspect(0, AddRequest(id, n, 0, params(), is_suspect=True), b"")


def test_suspects_are_tried_one_after_another_in_their_order() -> None:
    court = Court(suspect(1), suspect(5))
    assert court.probation.next() == suspect(1)
    assert not court.probation.has_next
    assert court.probation.num_held == 1
    for _ in range(STEPS):
        assert court.probation.is_busy
        court.probation.stepped([1, 99])
    assert not court.probation.is_busy
    assert court.probation.has_next
    assert court.probation.next() == suspect(5)
    assert court.on_trial == [[1], [], [5]]


def test_steps_of_others_prove_nothing_and_choices_step_together() -> None:
    court = Court(suspect(10, 3))
    court.probation.next()
    court.probation.stepped([1, 2])
    for _ in range(STEPS - 1):
        court.probation.stepped([10, 11, 12])
    assert court.probation.is_busy
    court.probation.stepped([12])
    assert court.on_trial == [[10, 11, 12], []]


def test_whoever_ends_has_passed_and_is_not_tried_when_it_was_held() -> None:
    court = Court(suspect(1, 2), suspect(5), suspect(6))
    court.probation.next()
    court.probation.ended([1, 5])
    assert court.on_trial[-1] == [2]
    assert not court.probation.has_next
    court.probation.ended([2])
    assert court.probation.next() == suspect(6)
