"""Log lines of every process: ``LEVEL time process message`` on stderr, one line a record, nothing forged, no secret.

Knows stdlib logging and nothing of ours. Each process calls ``configure`` once; modules then use
``logging.getLogger(__name__)`` as anywhere.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterable
from typing import TextIO

_OURS = "hybrid_serve"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_MASK = "***"
# Line breaks, ANSI sequences and direction overrides would let a model name or a path write lines of its own (ADV-57);
# a lone surrogate has no bytes.
_UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _UNSAFE}
_TOKENS = re.compile(r"(?i)(\bbearer\s+)[^\s\"',]+|\bhf_[A-Za-z0-9]{8,}")


def escape(text: str) -> str:
    """``text`` as one line that a terminal shows and does not obey."""
    return text.translate(_ESCAPES)


class LineFormatter(logging.Formatter):
    """Formats, escapes and masks. A traceback follows as lines that begin with ``  | ``: no level, no time."""

    def __init__(self, process: str, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._process = escape(process)
        self._secrets = sorted({secret for secret in secrets if secret}, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{record.levelname:<7} {when}.{int(record.msecs):03d} {self._process} "
        lines = [head + escape(self.mask(record.getMessage()))]
        if record.exc_info:
            lines += self._continued(self.formatException(record.exc_info))
        if record.stack_info:
            lines += self._continued(record.stack_info)
        return "\n".join(lines)

    def mask(self, text: str) -> str:
        """``text`` without the secrets of the configuration and without anything that looks like a token."""
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return _TOKENS.sub(lambda match: (match[1] or "") + _MASK, text)

    def _continued(self, text: str) -> list[str]:
        # Tracebacks carry messages of exceptions, hence text from outside: each line gets the mark.
        return [f"  | {escape(self.mask(line))}" for line in text.split("\n")]


def configure(level: str, process: str, secrets: Iterable[str] = (), stream: TextIO | None = None) -> None:
    """Routes every logger of this process, uvicorn's and Python's warnings included, to one handler on stderr.

    ``level`` ("debug", "info", "warning", "error") is ours; libraries are heard from "warning" on, at "debug" from
    "info" on. ``process`` names the process in each line ("engine", "api 0"). ``secrets`` are masked wherever they turn
    up. Called again, it replaces what it did before. Raises ValueError for an unknown level.
    """
    if level not in _LEVELS:
        raise ValueError(f"log level is {level!r}, must be one of {', '.join(_LEVELS)}")
    number = _LEVELS[level]
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(process, [*secrets, os.environ.get("HF_TOKEN", "")]))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(number, logging.INFO if number == logging.DEBUG else logging.WARNING))
    logging.getLogger(_OURS).setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    logging.captureWarnings(True)
