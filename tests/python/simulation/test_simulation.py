"""A whole server in one thread, under a network that loses, repeats, reorders and cuts messages (F-50, F-01, F-07)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from hybrid_serve.client.dealers import Dealers
from hybrid_serve.client.group import EngineGroup
from hybrid_serve.client.streams import ZmqStream
from hybrid_serve.engine.inbox import Inbox
from hybrid_serve.engine.peers import Peers
from hybrid_serve.engine.probation import Probation
from hybrid_serve.session import NotNext, Session
from simulation.world import SimulationFailed, run

NUM_SEEDS = 150  # `python -m simulation FIRST COUNT` runs more
MOST_SEEDS = 300  # in which a fault of ours must be found


def test_every_request_ends_with_its_own_tokens_once_or_says_why_and_nothing_is_left_behind() -> None:
    ends, counts = Counter[str](), Counter[str]()
    for seed in range(NUM_SEEDS):
        outcome = run(seed)
        ends += outcome.ends
        counts += outcome.counts
    assert ends["whole"] > 3 * NUM_SEEDS
    assert ends["engine_dead"] < NUM_SEEDS / 10, ends
    faults = ("drop", "duplicate", "overtake", "delay", "cut", "haunt", "break", "silence")
    for happened in (*faults, "engine deaths", "replayed"):
        assert counts[happened] > NUM_SEEDS / 5, f"{happened}: {counts}"


def test_a_seed_is_one_run_in_any_process() -> None:
    code = "from simulation.world import run; print(*(run(seed).digest for seed in range(40, 46)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [run(seed).digest for seed in range(40, 46)]
    assert there.stdout.split() == here
    assert len(set(here)) == len(here)


def run_all(num_seeds: int) -> None:
    for seed in range(num_seeds):
        run(seed)


def takes_again(session: Session, stamp: Any, frames: Any) -> None:
    if stamp.session != session.id:
        raise NotNext
    session._num_taken = max(session._num_taken, stamp.number + 1)


def skips_gaps(session: Session, stamp: Any, frames: Any) -> None:
    if stamp.session != session.id or stamp.number < session._num_taken:
        raise NotNext
    session._num_taken = stamp.number + 1


def takes_cut_ones(session: Session, stamp: Any, frames: Any) -> None:
    size = sum(map(len, frames))
    _take(session, stamp._replace(size=size), frames)


def takes_of_any_session(session: Session, stamp: Any, frames: Any) -> None:
    _take(session, stamp._replace(session=session.id, number=session._num_taken), frames)


def aborts_in_silence(group: EngineGroup, stream: ZmqStream, ids: list[int]) -> None:
    if (link := group._link_of.get(stream)) is not None:
        link.remove(stream, ids)
        group._forget_if_over(stream)


def asks_for_all(stream: ZmqStream, suspects: set[int]) -> Any:
    yield stream.first_message()


_take = Session.take
# What is broken, where, and by what.
BROKEN: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a message counts each time it comes": (Session, "take", takes_again),
    "a gap is not noticed": (Session, "take", skips_gaps),
    "a message that was cut is taken": (Session, "take", takes_cut_ones),
    "a message of another session is taken": (Session, "take", takes_of_any_session),
    "nobody asks whether the last message came": (Dealers, "every", lambda *_: None),
    "what an API server left behind runs on": (Peers, "take_lost", lambda self: []),
    "a session that is not known is not answered": (EngineGroup, "_refused", lambda *_: None),
    "a replay forgets what was received": (ZmqStream, "replay", asks_for_all),
    "ids of steps under way are taken for free": (Inbox, "_is_ending", lambda *_: False),
    "an abort is not sent": (EngineGroup, "abort", aborts_in_silence),
    "held suspects are forgotten": (Probation, "hold", lambda *_: None),
}


@pytest.mark.parametrize("what", BROKEN)
def test_it_finds(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must be seen within a few seeds, and said in one line with the seed and the command."""
    place, name, instead = BROKEN[what]
    monkeypatch.setattr(place, name, instead)
    with pytest.raises(SimulationFailed) as caught:
        run_all(MOST_SEEDS)
    message = str(caught.value)
    assert message.count("\n") == 0
    seed = int(message.removeprefix("seed ").partition(":")[0])
    assert message.endswith(f"python -m simulation --show {seed}")
    print(message)
    with pytest.raises(SimulationFailed) as again:
        run(seed)
    assert str(again.value) == message
