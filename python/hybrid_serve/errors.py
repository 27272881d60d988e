"""Errors that stop a start-up: one class, raised where the cause is known, shown once, as a box, at the end.

Codes and exit codes are those of catalogue.py; the exit code tells a script the class of the cause: 2 usage, 10 model
not found, 11 model corrupt, 12 does not fit in memory, 13 port busy, 14 unsafe file modes, 20 engine failed.
"""

from __future__ import annotations

from .catalogue import FAULTS
from .wire import StartupFailure


class StartupError(Exception):
    """``what`` happened, ``why``, and the ``fix`` as something to type or change; each one line, no paths of ours.
    ``exit_code``: None for the catalogue's, which any other must have a reason to differ from."""

    def __init__(self, code: str, what: str, why: str, fix: str, exit_code: int | None = None) -> None:
        super().__init__(f"{code}: {what}: {why}")
        exit_code = FAULTS[code].exit_code if exit_code is None else exit_code
        self.failure = StartupFailure(code, what, why, fix, exit_code)


def box(failure: StartupFailure) -> str:
    """The failure as the last lines that a failed start prints."""
    lines = [f"{failure.code}  {failure.what}", f"why   {failure.why}", f"fix   {failure.fix}"]
    width = max(len(line) for part in lines for line in part.splitlines())
    bar = "-" * width
    return "\n".join([bar, *lines, bar])
