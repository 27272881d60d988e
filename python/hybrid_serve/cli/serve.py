"""``hybrid-serve serve [MODEL]``: options to a Config, then the supervisor; prints the box of a failed start."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace

from .. import logging as log_lines
from ..checkpoint import demo
from ..config import Config
from ..errors import StartupError, box
from . import options
from .usage import UsageError

log = logging.getLogger(__name__)


def serve(argv: list[str]) -> int:
    """Exit code of the server: 0 after a drained stop; see errors.py for the others."""
    if wanted := _help_wanted(argv):
        print(options.help_text(wanted[0]))
        return 0
    chosen = options.parse(argv, os.environ)
    try:
        config = _with_model(chosen.config)
        log_lines.configure(config.server.log_level, "serve", config.server.secrets, form=config.server.log_format)
        log.info("%s", chosen.summary())
        for line in options.stray_variables(os.environ):
            log.warning("%s", line)
        if config.routing.models:
            from ..launch import several
            from .models_file import read_models  # only here: most starts need no YAML

            return several.serve(config, read_models(config), read=lambda: _read_again(argv))
        from ..launch import headless, supervisor

        if config.parallel.headless:
            return headless.serve(config)
        return supervisor.serve(config, read=lambda: _read_again(argv))
    except StartupError as error:
        if chosen.config.server.log_format == "json":
            log.error("%s", error, extra={"fields": {"code": error.failure.code, "fix": error.failure.fix}})
        else:
            print(box(error.failure), file=sys.stderr)
        return error.failure.exit_code


def _read_again(argv: list[str]) -> Config:
    """The same command line, over the file and the environment as they are by now. Raises ValueError."""
    try:
        config = options.parse(argv, os.environ).config
    except UsageError as error:
        raise ValueError("; ".join(error.lines)) from error
    return _with_model(config)


def _with_model(config: Config) -> Config:
    return config if config.routing.models else replace(config, model=demo.unless_named(config.model))


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
