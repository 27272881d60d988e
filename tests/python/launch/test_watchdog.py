"""When an engine counts as hung, and how often it may start again: by the test's own clock (F-03..F-05, P1, P2)."""

from __future__ import annotations

import os
from array import array

import pytest

from hybrid_serve.config import Config, SchedulerConfig, SupervisionConfig
from hybrid_serve.heartbeat import BatchHeader, EnginePhase, Heartbeat, make, max_watched_ids
from hybrid_serve.launch.restarts import LONGEST_PAUSE, WINDOW, Restarts
from hybrid_serve.launch.watchdog import Verdict, Watchdog

LIMITS = SupervisionConfig(engine_heartbeat_timeout=10, engine_iteration_timeout=60)


class Watched:
    """Both ends of a heartbeat, as two processes would have them, and the time."""

    def __init__(self, max_ids: int = 8) -> None:
        self.now = 1000.0
        fd = make(max_ids)
        self.engine = Heartbeat(fd, max_ids, lambda: int(self.now * 1e9))
        self.seen = Heartbeat(fd, max_ids, lambda: int(self.now * 1e9))
        os.close(fd)
        self.seen.clear()
        self.watchdog = Watchdog(LIMITS, self.seen, lambda: self.now)

    def step(self, num_tokens: int = 1, ids: tuple[int, ...] = (7,)) -> None:
        self.engine.enter_step(BatchHeader(3, 1, num_tokens, 1, 1, 1, 1, 0), array("Q", ids).tobytes())

    def verdict_after(self, seconds: float, *, has_pulse: bool) -> Verdict:
        """The last of the looks that are taken meanwhile."""
        verdict, end = self.watchdog.look(), self.now + seconds
        while self.now < end:
            self.now += 0.5
            if has_pulse:
                self.engine.pulse()
            verdict = self.watchdog.look()
        return verdict


def test_silence_is_noticed_at_half_the_limit_and_is_the_end_at_all_of_it() -> None:
    watched = Watched()
    watched.engine.enter(EnginePhase.IDLE)
    assert watched.verdict_after(5, has_pulse=False) is Verdict.FINE
    assert watched.verdict_after(1, has_pulse=False) is Verdict.QUIET
    assert watched.verdict_after(5, has_pulse=False) is Verdict.HUNG
    assert "no sign of life for 11.0 s" in watched.watchdog.reason
    watched.engine.pulse()
    assert watched.watchdog.look() is Verdict.FINE


def test_a_step_has_its_own_limit_which_grows_with_its_tokens() -> None:
    watched = Watched()
    watched.step(num_tokens=1)
    assert watched.verdict_after(60, has_pulse=True) is Verdict.FINE
    assert watched.verdict_after(1, has_pulse=True) is Verdict.HUNG
    watched.step(num_tokens=2000)
    assert watched.verdict_after(260, has_pulse=True) is Verdict.FINE
    assert watched.verdict_after(1, has_pulse=True) is Verdict.HUNG


def test_a_capture_that_hangs_is_called_one() -> None:  # P2
    watched = Watched()
    watched.engine.enter(EnginePhase.CAPTURE)
    assert watched.verdict_after(59, has_pulse=True) is Verdict.FINE
    assert watched.verdict_after(2, has_pulse=True) is Verdict.HUNG
    assert "its capture of a graph has taken" in watched.watchdog.reason


def test_a_model_may_load_as_long_as_it_likes() -> None:
    assert Watched().verdict_after(3600, has_pulse=False) is Verdict.FINE


def test_a_watchdog_that_was_stopped_itself_blames_nobody_for_that_time() -> None:
    watched = Watched()
    watched.step()
    assert watched.watchdog.look() is Verdict.FINE
    watched.now += 1000
    assert watched.watchdog.look() is Verdict.FINE
    assert watched.verdict_after(11, has_pulse=False) is Verdict.HUNG


def test_the_culprit_is_who_was_on_trial_and_ran() -> None:
    watched = Watched()
    assert (watched.seen.running, watched.seen.culprits) == (b"", b"")
    watched.engine.try_out(array("Q", [8, 9]).tobytes())
    watched.step(ids=(2**63 + 1, 7))
    assert array("Q", watched.seen.running).tolist() == [2**63 + 1, 7]
    assert watched.seen.culprits == b""  # it waited
    watched.step(ids=(7, 9))
    assert array("Q", watched.seen.culprits).tolist() == [8, 9]
    assert watched.seen.batch.step == 3
    watched.seen.clear()
    assert (watched.seen.running, watched.seen.culprits, watched.seen.batch.step) == (b"", b"", 0)


def test_more_ids_than_there_is_room_for_are_cut_off() -> None:
    watched = Watched(max_ids=2)
    watched.engine.try_out(array("Q", [1, 2, 3]).tobytes())
    watched.step(ids=(1, 2, 3))
    assert array("Q", watched.seen.running).tolist() == [1, 2]
    assert array("Q", watched.seen.culprits).tolist() == [1, 2]
    assert max_watched_ids(Config(scheduler=SchedulerConfig(max_num_seqs=10))) >= 2 * 10


def test_restarts_are_counted_in_a_window_and_their_pauses_double() -> None:
    restarts = Restarts(SupervisionConfig(max_restarts=3, restart_delay=1.0))
    assert [restarts.next_pause(now) for now in (0, 10, 20, 30)] == [0.0, 1.0, 2.0, None]
    assert restarts.recent == 3
    assert restarts.next_pause(WINDOW + 5) == 2.0  # the first is forgotten, two count
    assert restarts.next_pause(WINDOW + 6) is None
    assert restarts.total == 4


@pytest.mark.parametrize(("limit", "pauses"), [(0, [None]), (9, [0, 1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE])])
def test_there_may_be_none_and_no_pause_is_longer_than_half_a_minute(limit: int, pauses: list[float | None]) -> None:
    restarts = Restarts(SupervisionConfig(max_restarts=limit, restart_delay=1.0))
    assert [restarts.next_pause(0.0) for _ in pauses] == pauses
