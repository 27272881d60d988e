"""The generated pages say what the program does now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

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
