"""SIGHUP: the configuration is read again; what a terminal that goes means instead (P19)."""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from hybrid_serve import logging as log_lines
from hybrid_serve import shared_memory
from hybrid_serve.config import Config, SchedulerConfig, ServerConfig
from hybrid_serve.launch.reload import Reload
from hybrid_serve.live import LIVE, LiveOptions
from hybrid_serve.shared_memory import SharedMemory

STARTED = Config(scheduler=SchedulerConfig(max_num_seqs=8))


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    fd = shared_memory.make(1)
    yield SharedMemory(fd, 1)
    os.close(fd)
    log_lines.set_level("info")


def reload(memory: SharedMemory, read: Callable[[], Config] | None) -> None:
    Reload(STARTED, read, LiveOptions(memory))()


def test_every_live_option_is_set_to_what_the_configuration_says(
    memory: SharedMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """What was set through the admin route before is overruled; who reads later sees all of it."""
    reader = LiveOptions(memory)
    assert reader.news() is None
    LiveOptions(memory).change({"max_logprobs": 1, "log_requests": "meta"})
    assert reader.news() == {"max_logprobs": 1, "log_requests": "meta"}
    assert reader.news() is None
    wanted = replace(STARTED, scheduler=SchedulerConfig(2, 0, 5), server=ServerConfig(max_logprobs=3, port=1))
    reload(memory, lambda: wanted)
    news = reader.news()
    assert news is not None
    assert set(news) == set(LIVE)
    expected = {"max_num_seqs": 2, "max_num_queued_reqs": 5, "max_logprobs": 3, "log_requests": "off"}
    assert expected.items() <= news.items()
    assert LiveOptions(memory).news() == news
    assert "max_num_seqs=2, max_num_queued_reqs=5" in caplog.text
    assert "taken up by a restart only: port" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (replace(STARTED, scheduler=SchedulerConfig(max_num_seqs=9)), "max_num_seqs is 9, this server has room for 8"),
        (replace(STARTED, server=ServerConfig(max_logprobs=-1)), "max_logprobs is -1"),
        (None, "server.yaml:1: no such option"),
    ],
)
def test_a_bad_configuration_changes_nothing(
    memory: SharedMemory, caplog: pytest.LogCaptureFixture, wanted: Config | None, why: str
) -> None:
    def read() -> Config:
        if wanted is None:
            raise ValueError(why)
        return wanted

    reload(memory, read)
    assert LiveOptions(memory).news() is None
    assert f"all stays as it is: {why}" in caplog.text


def test_who_gave_no_way_to_read_it_again_is_told(memory: SharedMemory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        reload(memory, None)
    assert "nothing to read again" in caplog.text


def test_a_reader_never_sees_half_of_a_change(memory: SharedMemory) -> None:
    writer, reader = LiveOptions(memory), LiveOptions(memory)
    writer.change({"max_logprobs": 1})
    whole = memory.live[15]
    memory.live[15] = whole ^ 0xFF  # somebody is writing
    assert reader.news() is None
    memory.live[15] = whole
    assert reader.news() == {"max_logprobs": 1}


WAITING = """
import select
from hybrid_serve.launch.signals import Signals
signals = Signals()
print("waiting", flush=True)
select.select([signals.readable], [], [], 20)
print(*map(int, signals.take()), flush=True)
"""


def told(program: subprocess.Popen[str], send: Callable[[], None]) -> str:
    assert program.stdout is not None
    assert program.stdout.readline() == "waiting\n"
    send()
    assert select.select([program.stdout], [], [], 20)[0]
    return program.communicate(timeout=20)[0].strip()


def start(**options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True, env=environment, **options
    )


@pytest.mark.parametrize("terminal_goes", [False, True])
def test_a_terminal_that_goes_is_a_sigterm_and_a_hang_up_by_hand_is_not(terminal_goes: bool) -> None:
    """Else a server would outlive the window that it was started in."""
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    program = start(stdin=theirs, preexec_fn=take_terminal)
    os.close(theirs)
    if terminal_goes:
        assert told(program, lambda: os.close(ours)) == str(int(signal.SIGTERM))
    else:
        assert told(program, lambda: program.send_signal(signal.SIGHUP)) == str(int(signal.SIGHUP))
        os.close(ours)


def test_a_server_without_terminal_reads_again_and_one_under_nohup_hears_nothing() -> None:
    program = start(start_new_session=True)
    assert told(program, lambda: program.send_signal(signal.SIGHUP)) == str(int(signal.SIGHUP))

    def hang_up_then_end() -> None:
        program.send_signal(signal.SIGHUP)
        program.send_signal(signal.SIGTERM)

    program = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), start_new_session=True)
    assert told(program, hang_up_then_end) == str(int(signal.SIGTERM))
