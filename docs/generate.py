#!/usr/bin/env python3
"""Writes docs/reference/*.md from the tables that the program itself runs by; a test fails while a page is stale.

python docs/generate.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hybrid_serve.catalogue import FAULTS

REFERENCE = Path(__file__).parent / "reference"
NOTICE = "<!-- Made by docs/generate.py: edit the source that it reads, then run it again. -->\n"


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    made = {"errors.md": errors()}
    return {name: f"{NOTICE}\n{text.rstrip()}\n" for name, text in made.items()}


def errors() -> str:
    """One section an error, so that a link can point at its number."""
    parts = [
        "# Errors",
        "A failed start ends with a box that has one of these numbers; an HTTP error has it as `hs_code`.",
    ]
    for title, wanted in (("Starts", False), ("HTTP answers", True)):
        parts.append(f"## {title}")
        for fault in FAULTS.values():
            if bool(fault.status) is wanted:
                kind = f"HTTP {fault.status}, `error.code` `{fault.name}`" if wanted else f"exit code {fault.exit_code}"
                parts.append(f"### {fault.code}\n\n**{fault.title}** ({kind}). {fault.cause}\n\nFix: {fault.fix}")
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)


if __name__ == "__main__":
    main()
