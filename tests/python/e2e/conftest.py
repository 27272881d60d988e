from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_model import demo_file

from .server import Server, serving


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    return demo_file()


@pytest.fixture(scope="session")
def server(demo_gguf: Path) -> Iterator[Server]:
    """The demo model, served as the README serves it."""
    with serving("--max-model-len", "2048") as running:
        yield running
