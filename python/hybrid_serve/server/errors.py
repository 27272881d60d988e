"""The errors that a client can be given (those of catalogue.py that have a status), and their one shape on the wire.

``{"error": {"message", "type", "param", "code", "hs_code", "request_id"}}``. Nothing of an exception's own text reaches
a client unless it was written for one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from ..catalogue import ANSWERS
from ..client import EngineDead, EngineRejected

log = logging.getLogger(__name__)

_INVALID = "invalid_request_error"
_TYPES = {
    401: "authentication_error",
    403: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}

# code -> (HTTP status, type, our number)
CATALOGUE: dict[str, tuple[int, str, str]] = {
    name: (fault.status, _TYPES.get(fault.status, _INVALID), fault.code) for name, fault in ANSWERS.items()
}
_INTERNAL_MESSAGE = "The server had an error while processing your request."
_RETRY_SECONDS = {"model_loading": 2, "engine_dead": 5, "draining": 5, "engine_restarting": 2, "model_failed": 30}


class ErrorResponse(NamedTuple):
    """As it goes to the client."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class ApiError(Exception):
    """An entry of the catalogue with its message; ``param`` names the field, as ``messages[0].content``."""

    headers: Sequence[tuple[bytes, bytes]] = ()  # of the response, besides the usual ones
    more: Mapping[str, float] = {}  # fields of the error, besides the usual ones

    def __init__(self, code: str, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self._retry_after = retry_after
        self.status, self.type, self.hs_code = CATALOGUE[code]
        self.code, self.message, self.param = code, message, param

    @property
    def retry_after(self) -> int | None:
        if self._retry_after is not None:
            return self._retry_after
        return _RETRY_SECONDS.get(self.code, 1 if self.status in (429, 503) else None)

    def response(self, request_id: str | None) -> ErrorResponse:
        body = self.body(request_id)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after))
        if self.code == "draining":
            headers.append((b"connection", b"close"))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return ErrorResponse(self.status, headers + list(self.headers), body)

    def body(self, request_id: str | None) -> bytes:
        fields: dict[str, Any] = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        if self.hs_code:
            fields["hs_code"] = self.hs_code
        if request_id is not None:
            fields["request_id"] = request_id
        fields |= self.more
        return msgspec.json.encode({"error": fields})


def invalid(param: str, message: str) -> ApiError:
    """A value out of bounds."""
    return ApiError("invalid_value", message, param)


def not_supported(param: str, what: str | None = None) -> ApiError:
    """Something that exists elsewhere and not here yet: refused, never ignored."""
    return ApiError("unsupported_parameter", f"not supported yet: {what or param}", param)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about any exception; the unexpected ones are logged with their traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineRejected):
        return _from_engine(error)
    if isinstance(error, EngineDead):
        return ApiError("engine_dead", "The engine stopped while it worked on the request. Try again shortly.")
    log.error("unexpected error", exc_info=error)
    return ApiError("internal_error", _INTERNAL_MESSAGE)


def _from_engine(rejected: EngineRejected) -> ApiError:
    error = ApiError("internal_error", rejected.message, rejected.param)
    known = CATALOGUE.get(rejected.code)
    error.status, error.type, error.code = rejected.status, _TYPES.get(rejected.status, _INVALID), rejected.code
    error.hs_code = known[2] if known else ""
    return error


_WHERE = re.compile(r" - at `(?:key in )?\$(.*?)`$")
_MISSING = re.compile(r"missing required field `(.*)`")


def from_validation(error: msgspec.ValidationError) -> ApiError:
    """msgspec's message and path as ours: ``Expected `int`, got `str` - at `$.n``` -> invalid_type, param ``n``."""
    text = str(error)
    where = _WHERE.search(text)
    param = where.group(1).lstrip(".") if where else ""
    message = text[: where.start()] if where else text
    missing = _MISSING.search(message)
    if missing:
        path = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return ApiError("missing_required_parameter", f"'{path}' is required", path)
    # "Expected `int`, got `str`" is a type; "Expected `int` >= 1" and "Number out of range" are bounds.
    code = "invalid_type" if ", got `" in message else "invalid_value"
    return ApiError(code, f"'{param}': {message}" if param else message, param or None)
