"""The start-up errors that model files cause, one constructor a kind, so that each code has one wording.

HS-E021 not found (exit 10), HS-E022 corrupt (exit 11), HS-E023 not supported (exit 11).
"""

from __future__ import annotations

from pathlib import Path

from ..errors import StartupError


def not_found(what: str, why: str, fix: str) -> StartupError:
    return StartupError("HS-E021", what, why, fix)


def corrupt(path: Path | str, why: str, fix: str = "download the file again, or convert it again") -> StartupError:
    """``why`` names the tensor or key and the offset where one is known."""
    return StartupError("HS-E022", f"{Path(path).name} is not a valid model file", why, fix)


def unreadable(path: Path | str, error: OSError) -> StartupError:
    return corrupt(path, f"it cannot be read: {error.strerror}", "check the path and its permissions")


def unsupported(what: str, why: str, fix: str) -> StartupError:
    return StartupError("HS-E023", what, why, fix)
