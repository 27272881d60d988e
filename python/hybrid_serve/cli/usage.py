"""How a command refuses what was typed: one line, exit code 2, and the nearest thing that exists."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NoReturn


class UsageError(Exception):
    """What is wrong with the command line, the environment or the configuration file; each line says one thing."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of ending the process, and takes ``--a_b`` for ``--a-b``."""

    def __init__(self, prog: str, description: str, epilog: str | None = None, add_help: bool = True) -> None:
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def dashed(argv: Iterable[str]) -> list[str]:
    """``argv`` with ``_`` written as ``-`` in the names of options, not in their values, and not after ``--``."""
    words, options = [], True
    for word in argv:
        options = options and word != "--"
        if options and word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        words.append(word)
    return words


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean a, b?`` with the nearest of ``known``, or nothing."""
    import difflib

    matches = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(matches)}?" if matches else ""
