"""``explain HS-E###``: what an error's number means and what helps, from the catalogue."""

from __future__ import annotations

import textwrap

from ..catalogue import FAULTS, Fault
from .usage import Parser, UsageError, dashed, did_you_mean


def explain(argv: list[str]) -> int:
    """Prints one entry, or, without a number, one line for each."""
    parser = Parser(
        "hybrid-serve explain", "Says what an error's number means and what helps; without one: lists them."
    )
    parser.add_argument(
        "CODE", nargs="?", help="such as HS-E031, E031 or 31; or the code of an HTTP error, model_not_found"
    )
    word = parser.parse_args(dashed(argv)).CODE
    if word is None:
        for fault in FAULTS.values():
            print(f"{fault.code}  {fault.title}")
        return 0
    print(_page(_lookup(word)))
    return 0


def _lookup(word: str) -> Fault:
    digits = word.upper().removeprefix("HS-").removeprefix("E")
    code = f"HS-E{int(digits):03d}" if digits.isascii() and digits.isdigit() else ""
    for fault in FAULTS.values():
        if fault.code == code or (fault.name and fault.name == word.lower()):
            return fault
    names = [*FAULTS, *(fault.name for fault in FAULTS.values() if fault.name)]
    raise UsageError(f"there is no error {word!r}{did_you_mean(word, names)}")


def _page(fault: Fault) -> str:
    where = f"HTTP {fault.status}, error.code {fault.name}" if fault.status else f"exit code {fault.exit_code}"
    lines = [f"{fault.code}  {fault.title}", f"       {where}", ""]
    for head, text in (("why", fault.cause), ("fix", fault.fix)):
        lines.append(textwrap.fill(text, 100, initial_indent=f"{head:<7}", subsequent_indent=" " * 7))
    return "\n".join(lines)
