"""The generated pages say what the program does now."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from hybrid_serve.cli import completion
from hybrid_serve.cli.vllm_flags import NOT_SUPPORTED

DOCS = Path(__file__).parents[2] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_reference_page_is_as_the_generator_writes_it() -> None:
    pages = generator().pages()
    found = {file.name: file.read_text() for file in (DOCS / "reference").iterdir()}
    stale = sorted(name for name in pages.keys() | found.keys() if pages.get(name) != found.get(name))
    assert stale == [], "run: python docs/generate.py"


def test_what_is_said_about_vllm_is_about_flags_that_exist() -> None:
    ours = {flag for flags in completion.flags().values() for flag in flags}
    lacking = {f"--{name}" for name in NOT_SUPPORTED} | {"--plot-timeline", "--lora-modules"}
    named = set(re.findall(r"(?<=`)--[a-z-]+", (DOCS / "compatibility.md").read_text()))
    assert len(named) > 15
    assert named - ours - lacking == set()
