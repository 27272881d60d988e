"""A bug report as one zip: what doctor, collect-env and config explain say, and a log's end; no secret in any of it."""

from __future__ import annotations

import json
import os
import zipfile
from collections import deque
from typing import Any

from ..logging import LineFormatter
from . import options
from .config_explain import explained
from .settings import settings
from .usage import UsageError

_LOG_LINES = 500
_SHOWN_VARIABLES = (
    "HYBRID_SERVE_",
    "HF_",
    "CUDA_",
    "NVIDIA_",
    "OMP_",
    "LD_",
    "PYTHON",
    "LANG",
    "LC_",
    "XDG_",
    "TMPDIR",
)
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def write(path: str, log: str | None, facts: dict[str, dict[str, Any]], checks: str) -> None:
    """Raises UsageError for a file that cannot be read or written."""
    secrets: list[str] = []
    try:
        chosen = options.parse([], os.environ)
        configuration: Any = explained(chosen)
        secrets += [
            key
            for setting in settings()
            if setting.option.secret
            for key in getattr(getattr(chosen.config, setting.group), setting.name)
        ]
    except UsageError as error:  # that may be the very fault
        configuration = {"refused": list(error.lines)}
    secrets += [value for name, value in os.environ.items() if _is_secret(name) and len(value) > 3]
    home = os.path.expanduser("~")
    masking = LineFormatter("doctor", secrets)

    def clean(text: str) -> str:
        text = masking.mask(text)
        return text.replace(home, "~") if len(home) > 1 else text

    files = {
        "doctor.txt": checks,
        "collect-env.json": json.dumps(facts, indent=1),
        "config.json": json.dumps(configuration, indent=1),
        "environment.json": json.dumps(_environment(), indent=1),
    }
    if log:
        files["log.txt"] = _end_of(log)
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, text in files.items():
                bundle.writestr(name, clean(text))
    except OSError as error:
        raise UsageError(f"--bundle {path}: {error.strerror}") from None


def _is_secret(name: str) -> bool:
    return any(word in name.upper() for word in _SECRET_WORDS)


def _environment() -> dict[str, str]:
    """The variables that matter here; of the others not even the names."""
    shown = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_SHOWN_VARIABLES)}
    return {name: "***" if _is_secret(name) else value for name, value in shown.items()}


def _end_of(log: str) -> str:
    try:
        with open(log, errors="replace") as file:
            return "".join(deque(file, _LOG_LINES))
    except OSError as error:
        raise UsageError(f"--log {log}: {error.strerror}") from None
