"""What a request meets at its connection, before a task or a middleware runs for it."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from .access import Access, credentials
from .accounting import request_ended
from .context import ServerContext
from .entrance import Seat
from .errors import ErrorResponse
from .middleware import LocalHosts, request_id_of

# Requests that begin in one turn of the event loop, some 0.5 ms each: in between come tokens of others and refusals.
AT_ONCE = 16
AT_ONCE_BEHIND = 1  # while more connections come than are taken, and who begins would only wait in an engine


class Door:
    """Refuses, while the engines are full, as the application would and by the same functions, but with less work: of a
    burst, the last wait for all refusals before theirs. Whoever is let in has a seat from then on, and begins when it
    is his turn.

    Knows the routes that need an engine; no connection."""

    def __init__(
        self, context: ServerContext, paths: Iterable[str], hosts: LocalHosts | None, *, may_refuse: bool
    ) -> None:
        """``hosts``: that a request must name, None for any; ``may_refuse``: not where the application has more
        middleware than we know, or several models: then it alone knows the answer."""
        self._context, self._hosts, self._may_refuse = context, hosts, may_refuse
        self._paths = {path.encode(): path for path in paths}
        root = context.config.server.root_path
        self._full_paths = frozenset(root + path for path in self._paths.values())
        self._waiting: deque[Callable[[], None]] = deque()
        self.is_behind: Callable[[], bool] = lambda: False  # with connections
        self._num_left = 0  # that may begin in this turn
        self._is_turning = False

    def refusal(self, target: bytes, scope: Scope) -> ErrorResponse | None:
        """What a POST request gets at once, which is counted and logged then. ``target``: as it came; ``scope``: of
        ASGI, complete but for the path."""
        context, path, state = self._context, self._paths.get(target), scope["state"]
        if path is None or not self._may_refuse or not context.entrance.is_full() or not context.is_ready():
            return None
        began = monotonic()
        if not self._passes(scope):
            return None
        if (key := state.get("key")) is not None:
            if key.is_limited:  # it may have reached its own limit before
                return None
            context.metrics.key_used(key.name, "requests")
        scope["path"] = scope["root_path"] + path
        state["handler"], state["request_id"] = path, request_id_of(scope)
        response = context.entrance.refusal().response(state["request_id"])
        if context.config.server.enable_request_id_headers:
            response.headers.append((b"x-request-id", state["request_id"].encode()))
        request_ended(context, scope, response.status, monotonic() - began, len(response.body))
        return response

    def let_in(self, scope: Scope, app: Any, is_whole: Callable[[], bool], begin: Callable[[Any], None]) -> None:
        """Calls ``begin`` with the application when it is the request's turn: at once, if it needs no engine or has no
        seat. ``is_whole``: whether its body is there. (uvicorn's types are not Starlette's: hence ``Any``.)"""
        if scope["path"] not in self._full_paths:
            begin(app)
        elif self._context.models is not None:  # which one's engines it needs, its body says
            self._queue(functools.partial(begin, app))
        elif not self._passes(scope) or (seat := self._context.entrance.seat_if_free()) is None:
            begin(app)
        else:
            scope["state"]["seat"] = seat
            self._queue(functools.partial(begin, _seated(app, seat, is_whole)))

    def _passes(self, scope: Scope) -> bool:
        """Whether the application lets it come as far as its route."""
        if self._context.keys is None:
            return self._hosts is None or self._hosts.allow(scope)
        key = self._context.keys.find(credentials(scope))
        if key is None or Access.INFER.value not in key.scopes:
            return False
        scope["state"]["key"] = key
        return True

    def _queue(self, begin: Callable[[], None]) -> None:
        if not self._is_turning:
            self._is_turning, self._num_left = True, self._most()
            asyncio.get_running_loop().call_soon(self._next_turn)
        if self._num_left:
            self._num_left -= 1
            begin()
        else:
            self._waiting.append(begin)

    def _next_turn(self) -> None:
        most = self._most()
        num = min(most, len(self._waiting))
        self._num_left, self._is_turning = most - num, num > 0
        if self._is_turning:
            asyncio.get_running_loop().call_soon(self._next_turn)
        for _ in range(num):
            self._waiting.popleft()()

    def _most(self) -> int:
        is_patient = self.is_behind() and self._context.models is None and self._context.entrance.would_wait()
        return AT_ONCE_BEHIND if is_patient else AT_ONCE


def _seated(app: ASGIApp, seat: Seat, is_whole: Callable[[], bool]) -> ASGIApp:
    """Whatever answers the request, its seat is free then; nor is it kept for one whose body is still to come."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        if not is_whole():
            seat.leave()
            del scope["state"]["seat"]
        with seat:
            await app(scope, receive, send)

    return run
