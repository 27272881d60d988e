"""Reading a request's body within bounds."""

from __future__ import annotations

from starlette.types import Receive, Scope

from .errors import ApiError
from .headers import header_values
from .sse import ClientDisconnected


async def read_json_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The bytes of a JSON body. Raises ``ApiError`` (415, 413), before reading where the headers already tell."""
    types = header_values(scope, b"content-type")
    media_type = types[0].split(b";", 1)[0].strip().lower() if len(types) == 1 else b""
    # A page of another site can make a browser send a form or plain text, but not JSON without asking first.
    if media_type != b"application/json":
        raise ApiError("unsupported_media_type", "The body must be JSON: Content-Type: application/json.")
    encodings = header_values(scope, b"content-encoding")
    codings = header_values(scope, b"transfer-encoding")
    if any(value.strip().lower() not in (b"", b"identity") for value in encodings) or any(
        value.strip().lower() != b"chunked" for value in codings
    ):
        raise ApiError("unsupported_media_type", "A body that is compressed or encoded is not supported.")
    lengths = header_values(scope, b"content-length")
    if lengths and lengths[0].isdigit() and int(lengths[0][:20]) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError("request_too_large", f"The body is larger than {max_bytes} bytes.")
