"""What every request passes before a route sees it. Pure ASGI; outermost first: RequestId, Accounting, CORS (where
origins are allowed), Errors, the user's own, Authentication (where keys are set) or HostCheck (on a loopback address
without one)."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import logging as log_lines
from .errors import ApiError, as_api_error
from .headers import header_values
from .sse import ClientDisconnected

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(scope: Scope) -> str:
    """The client's ``X-Request-Id`` if it is printable and short, else a new one."""
    given = header_values(scope, b"x-request-id")
    request_id = given[0].decode("latin-1") if len(given) == 1 else ""
    return request_id if _REQUEST_ID.fullmatch(request_id) else os.urandom(16).hex()


class RequestId:
    """Gives every request an id, and tells it."""

    def __init__(self, app: ASGIApp, is_told: bool) -> None:
        self.app, self._is_told = app, is_told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        log_lines.request_id.set(request_id)
        if not self._is_told:
            await self.app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        await self.app(scope, receive, send_with_id)


class Errors:
    """Turns whatever was raised before the response started into the one error shape."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_noting_start)
        except ClientDisconnected:
            return
        except Exception as error:
            if started:
                raise
            await send_error(scope, send, from_http(error, scope))


def from_http(error: Exception, scope: Scope) -> ApiError:
    if isinstance(error, HTTPException) and error.status_code == 404:
        return ApiError("not_found", "There is no such route.")
    if isinstance(error, HTTPException) and error.status_code == 405:
        return ApiError("method_not_allowed", f"This route does not answer {scope['method'][:16]}.")
    return as_api_error(error)


async def send_error(scope: Scope, send: Send, error: ApiError) -> None:
    status, headers, body = error.response(scope.get("state", {}).get("request_id"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class HostCheck:
    """On a loopback address without a key, ``Host`` must name this machine: else any web page could drive the server
    through a name that it makes resolve to 127.0.0.1."""

    def __init__(self, app: ASGIApp, hosts: LocalHosts) -> None:
        self.app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._hosts.allow(scope):
            raise ApiError("host_not_allowed", "The Host header does not name this machine.")
        await self.app(scope, receive, send)


class LocalHosts:
    """What ``Host`` may be where it must name this machine."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(("localhost", *(name.lower() for name in names)))

    def allow(self, scope: Scope) -> bool:
        values = header_values(scope, b"host")
        if len(values) != 1:
            return not values  # HTTP/1.0 has none
        host = values[0].decode("latin-1").lower()
        name = host[1 : host.find("]")] if host.startswith("[") else host.rsplit(":", 1)[0] if ":" in host else host
        if name in self._names:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False
