"""Who may use which route: a key for everything that is not public, and the scope of that key at the route itself."""

from __future__ import annotations

from enum import Enum

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .headers import header_values
from .keys import Key, KeyRing
from .metrics import Metrics

PUBLIC_PATHS = frozenset(("/", "/live", "/ready", "/health", "/ping"))


class Access(Enum):
    """What a route asks for; the value is the scope that a key needs."""

    PUBLIC = ""
    INFER = "infer"
    METRICS = "metrics"
    ADMIN = "admin"


class Authentication:
    """Default deny: every path but the public ones needs a key, as a bearer token or in ``x-api-key``, whether or not
    there is such a route. Knows no route: see ``Guarded``."""

    def __init__(self, app: ASGIApp, ring: KeyRing, metrics: Metrics) -> None:
        self.app, self._ring, self._metrics = app, ring, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in PUBLIC_PATHS:
            return await self.app(scope, receive, send)
        found = scope["state"].get("key")  # by the door; a user's middleware may have called anything so
        key = found if isinstance(found, Key) else self._ring.find(credentials(scope))
        if key is None:
            raise ApiError("invalid_api_key", "A valid API key is needed: Authorization: Bearer KEY.")
        scope["state"]["key"] = key
        if scope["method"] == "POST":
            return await self._counted(key, scope, receive, send)
        return await self.app(scope, receive, send)

    async def _counted(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._ring.headers(key)]
            await send(message)

        try:
            self._ring.begin(key)
        except ApiError as error:
            self._metrics.key_used(key.name, "refused")
            error.headers = self._ring.headers(key)
            raise
        self._metrics.key_used(key.name, "requests")
        try:
            await self.app(scope, receive, send_with_limits)
        finally:
            self._ring.end(key)


def credentials(scope: Scope) -> list[bytes]:
    """What the request offers as a key; nothing if a header comes twice."""
    tokens, keys = header_values(scope, b"authorization"), header_values(scope, b"x-api-key")
    if len(tokens) > 1 or len(keys) > 1:
        return []
    candidates = list(keys)
    for token in tokens:
        scheme, _, value = token.partition(b" ")
        if scheme.lower() == b"bearer":
            candidates.append(value.strip())
    return candidates


class Guarded:
    """One route's endpoint behind what it asks for. The second wall: what reaches a route by whatever spelling of its
    path is held to what the route itself asks for (ADV-42)."""

    def __init__(self, path: str, access: Access, asks_for_keys: bool, endpoint: ASGIApp) -> None:
        self._path, self._access, self._asks, self._endpoint = path, access, asks_for_keys, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        state["handler"] = self._path
        self._check(state.get("key"))
        await self._endpoint(scope, receive, send)

    def _check(self, key: Key | None) -> None:
        if self._access is Access.PUBLIC:
            return
        if key is not None:
            if self._access.value not in key.scopes:
                raise ApiError("insufficient_scope", f"This route needs a key with the scope '{self._access.value}'.")
        elif self._asks:
            raise ApiError("invalid_api_key", "A valid API key is needed: Authorization: Bearer KEY.")
        elif self._access is Access.ADMIN:
            raise ApiError("insufficient_scope", "This route needs a server with --admin-api-key or an admin key.")
