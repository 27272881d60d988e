"""What users name by its import path: ASGI middleware, and a function that says what of a text may be logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..errors import StartupError

log = logging.getLogger(__name__)
FAILED = "[the redactor failed]"


def middleware(name: str) -> Any:
    """The class ``package.module.Class``. Raises StartupError."""
    found = _imported("middleware", name, "package.module.Class")
    if not isinstance(found, type):
        fix = "a class whose objects are ASGI applications: __init__(app), __call__(scope, receive, send)"
        raise StartupError("HS-E043", f"middleware {name} is no class", f"it is a {type(found).__name__}", fix)
    return found


def redactor(name: str) -> Callable[[str], str] | None:
    """The function ``package.module.function``; None where none is named. Raises StartupError. What it fails at is not
    logged at all."""
    if not name:
        return None
    redact = _imported("redactor", name, "package.module.function")
    if not callable(redact):
        fix = "a function that is given a text and gives the text that may be logged"
        raise StartupError("HS-E043", f"redactor {name} cannot be called", f"it is a {type(redact).__name__}", fix)

    def redacted(text: str) -> str:
        try:
            found = redact(text)
        except Exception as error:  # its message may quote the text
            log.error("--log-redactor failed with %s", type(error).__name__)
            return FAILED
        return found if isinstance(found, str) else FAILED

    return redacted


def _imported(what: str, name: str, fix: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise StartupError("HS-E043", f"{what} {name} cannot be imported", why, fix) from error
