"""Reading request headers."""

from __future__ import annotations

from starlette.types import Scope

RANK_HEADER = "x-data-parallel-rank"
TIMEOUT_HEADER = "x-request-timeout"


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """Every value of a header; ``name`` in lower case."""
    return [value for key, value in scope["headers"] if key == name]
