"""The README's commands and programs, as it prints them: what is marked is extracted, and what is extracted is run.

A block is marked by an HTML comment on the line above it: ``<!-- test: python -->`` before a ```python fence.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

MARK = re.compile(r"^<!-- test: (\S+)(?: (\S+))? -->$")
FENCE = re.compile(r"^(`{3,})(\S*)$")


class Snippet(NamedTuple):
    """One marked block: its language, the name after it in the mark ("" if there is none), first line, and text."""

    language: str
    name: str
    line: int
    text: str


def snippets(markdown: str) -> list[Snippet]:
    """The marked blocks, in order. Raises ValueError for a mark without a block, a block in another language and a
    block that never ends: any of these would leave a snippet untested in silence."""
    found: list[Snippet] = []
    lines = enumerate(markdown.splitlines(), start=1)
    mark: re.Match[str] | None = None
    for number, line in lines:
        fence = FENCE.match(line.rstrip())
        if mark and (not fence or fence[2] != mark[1]):
            raise ValueError(f"line {number}: a block of {mark[1]} must follow its mark")
        if not fence:
            if "<!-- test" in line and not MARK.match(line.rstrip()):
                raise ValueError(f"line {number}: not a mark: {line}")
            mark = MARK.match(line.rstrip())
            continue
        body = []
        for _, inner in lines:
            if inner.rstrip() == fence[1]:
                break
            body.append(inner)
        else:
            raise ValueError(f"line {number}: a block that never ends")
        if mark:
            found.append(Snippet(mark[1], mark[2] or "", number + 1, "\n".join(body) + "\n"))
        mark = None
    if mark:
        raise ValueError("the last mark has no block")
    return found


def test_marked_blocks_are_extracted_with_their_lines() -> None:
    text = "\n".join(
        [
            "# Title",
            "```bash",
            "not marked",
            "<!-- test: bash -->",
            "```",
            "<!-- test: bash install -->",
            "```bash",
            "echo one",
            "",
            "echo two",
            "```",
            "<!-- test: python -->",
            "````python",
            'print("""```""")',
            "```",
            "````",
        ]
    )
    assert snippets(text) == [
        Snippet("bash", "install", 8, "echo one\n\necho two\n"),
        Snippet("python", "", 14, 'print("""```""")\n```\n'),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- test: python -->\n\n```python\n```", "line 2: a block of python must follow"),
        ("<!-- test: python -->\n```bash\n```", "line 2: a block of python must follow"),
        ("<!-- test: python -->", "the last mark has no block"),
        ("<!-- test python -->\n```python\n```", "line 1: not a mark"),
        ("```bash\necho", "line 1: a block that never ends"),
    ],
)
def test_a_mark_that_would_test_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        snippets(text)
