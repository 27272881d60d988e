"""One line and one count a request, whatever became of it."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .context import ServerContext
from .headers import header_values

log = logging.getLogger(__name__)
_METHODS = frozenset(("GET", "HEAD", "POST", "PATCH", "OPTIONS", "PUT", "DELETE"))
CLIENT_GONE = 499  # in the log and the counts only: nobody was left to be told


class Accounting:
    """Counts requests by route and writes the access log. Knows the route's path, the status and sizes; never a header,
    a query or a body."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self.app, self._context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status, size = monotonic(), CLIENT_GONE, 0
        self._context.take_news()

        async def send_counted(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        except Exception:
            status = 500
            raise
        finally:
            request_ended(self._context, scope, status, monotonic() - began, size)


def request_ended(context: ServerContext, scope: Scope, status: int, seconds: float, size: int) -> None:
    """Counts and logs it. ``size``: bytes of the answer's body; ``scope``: its state has what became known of it."""
    state: dict[str, Any] = scope.get("state", {})
    handler = state.get("handler", "none")
    announced = header_values(scope, b"content-length")
    length = int(announced[0]) if len(announced) == 1 and announced[0].isdigit() else 0
    method = scope["method"] if scope["method"] in _METHODS else "other"
    context.metrics.http.ended(handler, method, status, seconds, length, size)
    server = context.config.server
    if server.access_log == "off" or (server.access_log == "errors" and status < 400):
        return
    if handler in server.disable_access_log_for_endpoints and status < 400:
        return
    client = scope.get("client")
    key = state.get("key")
    fields = {
        "request_id": state.get("request_id"),
        "client": f"{client[0]}:{client[1]}" if client else "local",
        "key": key.name if key is not None else None,
        "method": scope["method"][:16],
        "path": quote(scope["path"][:256]),  # without a space that could begin a field of its own
        "status": status,
        "ms": round(seconds * 1e3, 1),
        "bytes": size,
    }
    words = [f"{name}={value}" for name, value in fields.items() if value is not None]
    log.info("access %s", " ".join(words), extra={"fields": fields})
