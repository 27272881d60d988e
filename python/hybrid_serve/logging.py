"""Log lines of every process: ``LEVEL time process message`` or a JSON object on stderr, one line a record, nothing
forged, no secret.

Knows stdlib logging and nothing of ours. Each process calls ``configure`` once; modules then use
``logging.getLogger(__name__)`` as anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar
from typing import TextIO

_OURS = "hybrid_serve"
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of what this task works on
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_MASK = "***"
_PATIENCE_MS = 20  # with a reader that is slow; one that has stopped is waited for once
# Line breaks, ANSI sequences and direction overrides would let a model name or a path write lines of its own (ADV-57);
# a lone surrogate has no bytes.
_UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _UNSAFE}
_TOKENS = re.compile(r"(?i)(\bbearer\s+)[^\s\"',]+|\bhf_[A-Za-z0-9]{8,}")


def escape(text: str) -> str:
    """``text`` as one line that a terminal shows and does not obey."""
    return text.translate(_ESCAPES)


class Masked(logging.Formatter):
    """What both formats share: no secret passes."""

    def __init__(self, process: str, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._process = escape(process)
        self._secrets: list[str] = []
        self.hide(secrets)

    def hide(self, secrets: Iterable[str]) -> None:
        """Masks these, too, from now on."""
        known = {secret for secret in (*self._secrets, *secrets) if secret}
        self._secrets = sorted(known, key=len, reverse=True)

    def mask(self, text: str) -> str:
        """``text`` without the secrets of the configuration and without anything that looks like a token."""
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return _TOKENS.sub(lambda match: (match[1] or "") + _MASK, text)


class LineFormatter(Masked):
    """Formats, escapes and masks. A traceback follows as lines that begin with ``  | ``: no level, no time."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{record.levelname:<7} {when}.{int(record.msecs):03d} {self._process} "
        lines = [head + escape(self.mask(record.getMessage()))]
        if record.exc_info:
            lines += self._continued(self.formatException(record.exc_info))
        if record.stack_info:
            lines += self._continued(record.stack_info)
        return "\n".join(lines)

    def _continued(self, text: str) -> list[str]:
        # Tracebacks carry messages of exceptions, hence text from outside: each line gets the mark.
        return [f"  | {escape(self.mask(line))}" for line in text.split("\n")]


class JsonFormatter(Masked):
    """One JSON object a line: ts (RFC 3339, UTC), level, process, logger, message; where there are any request_id,
    traceback and what the caller gave as ``extra={"fields": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "ts": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (id := request_id.get()) is not None:
            line["request_id"] = id
        for name, value in getattr(record, "fields", {}).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        # Masked before it is encoded: a secret may be spelt differently in JSON.
        masked = {name: self.mask(value) if isinstance(value, str) else value for name, value in line.items()}
        return json.dumps(masked)


class Lines(logging.StreamHandler[TextIO]):
    """Writes lines as long as somebody takes them. Where a reader has stopped or a disk is full they are dropped and
    counted, and the next one that is taken says how many: what a server does must not wait for who reads of it."""

    num_dropped = 0  # by this process

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._num_told, self._is_blocked, self._is_torn = Lines.num_dropped, False, False
        self._poll: select.poll | None = None
        with suppress(OSError, ValueError):  # not a file
            self._fd = stream.fileno()
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        untold = Lines.num_dropped - self._num_told
        if untold and self._put(_dropped(untold)):
            self._num_told += untold
        if not self._put(record):
            Lines.num_dropped += 1

    def _put(self, record: logging.LogRecord) -> bool:
        try:
            line = self.format(record) + self.terminator
            if self._poll is None:
                self.stream.write(line)
                return True
            self.stream.flush()
            data = (self.terminator * self._is_torn + line).encode(errors="backslashreplace")
            # A pipe that can be written has room for so many bytes. Of a longer line the rest may be lost.
            for at in range(0, len(data), select.PIPE_BUF):
                if not self._write(data[at : at + select.PIPE_BUF]):
                    self._is_torn = self._is_torn or at > 0
                    return False
            self._is_torn = False
            return True
        except OSError:  # its reader is gone, or the disk is full
            return False
        except Exception:
            self.handleError(record)
            return True

    def _write(self, data: bytes) -> bool:
        assert self._poll is not None
        events = self._poll.poll(0 if self._is_blocked else _PATIENCE_MS)
        self._is_blocked = not events
        return bool(events) and os.write(self._fd, data) == len(data)


def _dropped(count: int) -> logging.LogRecord:
    text = "%d lines before this one were dropped: nobody took them"
    return logging.LogRecord(__name__, logging.WARNING, "", 0, text, (count,), None)


FORMATS: dict[str, type[Masked]] = {"text": LineFormatter, "json": JsonFormatter}


def hide(secrets: Iterable[str]) -> None:
    """Masks these, too, in whatever this process logs from now on."""
    secrets = list(secrets)
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, Masked):
            handler.formatter.hide(secrets)


def set_level(level: str) -> None:
    """Of this process, now. Raises ValueError for an unknown level."""
    if level not in _LEVELS:
        raise ValueError(f"log level is {level!r}, must be one of {', '.join(_LEVELS)}")
    number = _LEVELS[level]
    logging.getLogger().setLevel(max(number, logging.INFO if number == logging.DEBUG else logging.WARNING))
    logging.getLogger(_OURS).setLevel(number)


def configure(
    level: str, process: str, secrets: Iterable[str] = (), stream: TextIO | None = None, *, form: str = "text"
) -> None:
    """Routes every logger of this process, uvicorn's and Python's warnings included, to one handler on stderr.

    ``level`` ("debug", "info", "warning", "error") is ours; libraries are heard from "warning" on, at "debug" from
    "info" on. ``process`` names the process in each line ("engine", "api 0"). ``secrets`` are masked wherever they turn
    up. ``form``: a key of ``FORMATS``. Called again, it replaces what it did before. Raises ValueError for an unknown
    level.
    """
    set_level(level)
    handler = Lines(stream or sys.stderr)
    handler.setFormatter(FORMATS[form](process, [*secrets, os.environ.get("HF_TOKEN", "")]))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    logging.captureWarnings(True)
