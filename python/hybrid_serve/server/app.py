"""The ASGI application: the table of routes and the middleware around it. Imports no torch and no engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..config import is_loopback
from . import answers, protocol
from .body import read_json_body
from .context import ServerContext
from .endpoints import health, models
from .endpoints.chat import create_chat_completion
from .endpoints.completions import create_completion
from .endpoints.tokenize import detokenize, tokenize
from .errors import ApiError
from .metrics import CONTENT_TYPE
from .middleware import Authentication, Errors, HostCheck, RequestId
from .openapi import openapi
from .protocol import decode_request
from .sse import Exchange

T = TypeVar("T", bound=msgspec.Struct)
Handler = Callable[[ServerContext, T, Exchange], Awaitable[None]]


@dataclass(frozen=True)
class PostRoute(Generic[T]):
    """One line of the table of routes: it routes, validates and documents."""

    path: str
    handler: Handler[T]
    request: type[T]
    response: type[msgspec.Struct]
    streams: bool = False


POST_ROUTES: tuple[PostRoute[Any], ...] = (
    PostRoute(
        "/v1/chat/completions",
        create_chat_completion,
        protocol.ChatCompletionRequest,
        answers.ChatCompletion,
        streams=True,
    ),
    PostRoute("/v1/completions", create_completion, protocol.CompletionRequest, answers.Completion, streams=True),
    PostRoute("/tokenize", tokenize, protocol.TokenizeRequest, answers.Tokenized),
    PostRoute("/detokenize", detokenize, protocol.DetokenizeRequest, answers.Detokenized),
)


class _Post(Generic[T]):
    """Reads, validates and runs one POST route, watching the client meanwhile."""

    def __init__(self, context: ServerContext, route: PostRoute[T]) -> None:
        self._context, self._route = context, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, server = self._context, self._context.config.server
        context.lifecycle.check()
        body = await read_json_body(scope, receive, server.max_request_bytes)
        request, ignored = decode_request(body, self._route.request, server.strict_requests)
        del body
        exchange = Exchange(scope, receive, send, context.lifecycle, server.sse_keep_alive_interval)
        exchange.name_ignored(ignored)
        await exchange.run(self._route.handler(context, request, exchange))


def create_app(context: ServerContext) -> Starlette:
    """Every route but the health ones needs a key where keys are set (the middleware denies by default)."""
    server = context.config.server
    middleware = [Middleware(RequestId), Middleware(Errors)]
    if server.api_key:
        middleware.append(Middleware(Authentication, server.api_key))
    elif is_loopback(server.host):
        middleware.append(Middleware(HostCheck, (server.host,)))
    routes = [
        *(Route(route.path, _Post(context, route), methods=["POST"]) for route in POST_ROUTES),
        *_get_routes(context),
    ]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={404: _raise, 405: _raise})
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def _get_routes(context: ServerContext) -> list[Route]:
    async def live(_: Request) -> Response:
        return _json(health.live())

    async def ready(_: Request) -> Response:
        status, body = health.ready(context)
        return _json(body, status, {} if status == 200 else {"retry-after": "2"})

    async def version(_: Request) -> Response:
        return _json(health.version())

    async def metrics(_: Request) -> Response:
        return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def list_models(_: Request) -> Response:
        return _json(models.list_models(context))

    async def get_model(request: Request) -> Response:
        return _json(models.get_model(context, request.path_params["id"]))

    async def describe(_: Request) -> Response:
        return _json(openapi(POST_ROUTES))

    async def links(_: Request) -> Response:
        return _json(health.links())

    return [
        Route("/", links),
        Route("/live", live),
        Route("/ready", ready),
        Route("/health", ready),
        Route("/version", version),
        Route("/metrics", metrics),
        Route("/openapi.json", describe),
        Route("/v1/models", list_models),
        Route("/v1/models/{id:path}", get_model),
    ]


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


async def _raise(request: Request, error: Exception) -> Response:
    """Leaves the shape of Starlette's own errors to the middleware."""
    if isinstance(error, ApiError):
        raise error
    raise error
