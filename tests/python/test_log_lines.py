"""Log lines: one a record, no secret, nothing forged (ADV-57)."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator

import pytest

from hybrid_serve import logging as log_lines

KEY = "canary-7b1f"
LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR) +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} api 0 (.*)")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a process that logs at "info" writes; the logging of this process is put back afterwards."""
    root = logging.getLogger()
    names = ("hybrid_serve", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    log_lines.configure("info", "api 0", [KEY], stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


def test_a_line_is_level_time_process_message(stream: io.StringIO) -> None:
    logging.getLogger("hybrid_serve.server.app").info("ready in %.1f s", 1.25)
    match = LINE.fullmatch(stream.getvalue().removesuffix("\n"))
    assert match
    assert match.groups() == ("INFO", "ready in 1.2 s")


@pytest.mark.parametrize(
    "hostile",
    ["a\nERROR forged", "a\r\nb", "\x1b[2J", "\x9b31m", "a\u2028b", "\u202etxt.exe", "\x00", "\x7f", "\x85", "\ud800"],
)
def test_text_from_outside_cannot_forge_or_move_anything(stream: io.StringIO, hostile: str) -> None:
    logging.getLogger("hybrid_serve").info("model %s", hostile)
    logged = stream.getvalue()
    assert len(logged.splitlines()) == 1
    match = LINE.fullmatch(logged.removesuffix("\n"))
    assert match
    assert match[2].isprintable()
    assert match[2].startswith("model ")


def test_a_traceback_cannot_forge_a_line_either(stream: io.StringIO) -> None:
    try:
        raise ValueError(f"bad\nERROR 2026-01-01 00:00:00.000 api 0 forged\n{KEY}")
    except ValueError:
        logging.getLogger("hybrid_serve").exception("a step failed")
    first, *others = stream.getvalue().splitlines()
    assert LINE.fullmatch(first)
    assert len(others) >= 4
    assert all(line.startswith("  | ") for line in others)
    assert KEY not in stream.getvalue()


def test_secrets_are_masked_wherever_they_turn_up(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("hybrid_serve")
    log.info("key %s, header Authorization: Bearer %s, hub %s", KEY, "abcdef", "hf_AbCdEfGhIjKl")
    monkeypatch.setenv("HF_TOKEN", "other-token")
    log_lines.configure("info", "api 0", [KEY + "-longer", KEY], stream)
    log.info("%s %s %s", "other-token", KEY + "-longer", KEY)
    text = stream.getvalue()
    assert "key ***, header Authorization: Bearer ***, hub ***" in text
    assert text.endswith("*** *** ***\n")


def test_debug_is_silent_and_libraries_speak_from_warning_on(stream: io.StringIO) -> None:
    logging.getLogger("hybrid_serve").debug("no")
    logging.getLogger("httpx").info("no")
    logging.getLogger("httpx").warning("yes")
    assert stream.getvalue().count("\n") == 1


def test_uvicorn_writes_through_us_and_not_twice(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler(stream))
    log_lines.configure("info", "api 0", (), stream)
    logging.getLogger("uvicorn.error").error("oops")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.access").info("GET /health")
    (line,) = stream.getvalue().splitlines()
    assert LINE.fullmatch(line)


def test_warnings_of_python_are_one_line(stream: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # catch_warnings replaced the hook that configure had set
        logging.captureWarnings(True)
        warnings.warn("old\nthing", stacklevel=1)
        logging.captureWarnings(False)
    (line,) = stream.getvalue().splitlines()
    assert "old\\nthing" in line


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud', must be one of debug, info, warning, error"):
        log_lines.configure("loud", "api 0")


def test_the_default_stream_is_stderr(capsys: pytest.CaptureFixture[str], stream: io.StringIO) -> None:
    log_lines.configure("error", "engine")
    logging.getLogger("hybrid_serve").warning("no")
    logging.getLogger("hybrid_serve").error("yes")
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert sys.stderr is not stream


def test_a_reader_that_stops_costs_lines_and_no_time_and_is_told_how_many(stream: io.StringIO) -> None:
    """F-60: a pipe that is full, as behind a log shipper that hangs."""
    read, write = os.pipe()
    logger = logging.getLogger("hybrid_serve")
    with os.fdopen(write, "w") as pipe:
        log_lines.configure("info", "api 0", (), pipe)
        dropped, began = log_lines.Lines.num_dropped, time.monotonic()
        for number in range(3000):
            logger.info("line %d %s", number, "x" * 100)
        logger.info("a long one %s", "y" * 100_000)
        assert time.monotonic() - began < 5
        dropped = log_lines.Lines.num_dropped - dropped
        assert dropped > 1000
        taken = os.read(read, 1 << 20).decode()
        logger.info("the last")
    with os.fdopen(read) as rest:
        lines = (taken + rest.read()).splitlines()
    kept = [int(line.split(" line ")[1].split()[0]) for line in lines if " line " in line and line.endswith("x")]
    assert kept == list(range(len(kept)))
    assert 3001 - dropped - len(kept) in (0, 1), "at most one is torn"
    assert LINE.fullmatch(lines[-2])[2] == f"{dropped} lines before this one were dropped: nobody took them"  # type: ignore[index]
    assert LINE.fullmatch(lines[-1])[2] == "the last"  # type: ignore[index]


def test_a_full_disk_stops_nobody(stream: io.StringIO) -> None:
    """F-60"""
    dropped = log_lines.Lines.num_dropped
    with open("/dev/full", "w") as full:
        log_lines.configure("info", "api 0", (), full)
        for _ in range(10):
            logging.getLogger("hybrid_serve").error("lost")
        assert log_lines.Lines.num_dropped == dropped + 10
