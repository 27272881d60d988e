"""The ASGI application: the table of routes and the middleware around it. Imports no torch and no engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..config import ServerConfig
from ..problems import is_loopback
from . import answers, plugins, protocol
from .access import Access, Authentication, Guarded
from .accounting import Accounting
from .body import read_json_body
from .context import ServerContext
from .door import Door
from .endpoints import admin, health, models
from .endpoints.chat import create_chat_completion
from .endpoints.completions import create_completion
from .endpoints.docs import HEADERS as DOCS_HEADERS
from .endpoints.docs import page
from .endpoints.tokenize import detokenize, tokenize
from .entrance import Seat
from .exposition import CONTENT_TYPE
from .middleware import Errors, HostCheck, LocalHosts, RequestId
from .openapi import openapi
from .protocol import decode_request, decoder_of
from .sse import Exchange

T = TypeVar("T", bound=protocol.ModelRequest)
Handler = Callable[[ServerContext, T, Exchange], Awaitable[None]]


@dataclass(frozen=True)
class PostRoute(Generic[T]):
    """One line of the table of routes: it routes, validates and documents."""

    path: str
    handler: Handler[T]
    request: type[T]
    response: type[msgspec.Struct]
    generates: bool = False  # and streams what it generates, if asked to


POST_ROUTES: tuple[PostRoute[Any], ...] = (
    PostRoute(
        "/v1/chat/completions",
        create_chat_completion,
        protocol.ChatCompletionRequest,
        answers.ChatCompletion,
        generates=True,
    ),
    PostRoute("/v1/completions", create_completion, protocol.CompletionRequest, answers.Completion, generates=True),
    PostRoute("/tokenize", tokenize, protocol.TokenizeRequest, answers.Tokenized),
    PostRoute("/detokenize", detokenize, protocol.DetokenizeRequest, answers.Detokenized),
)


class _Post(Generic[T]):
    """Reads, validates and runs one POST route, watching the client meanwhile."""

    def __init__(self, context: ServerContext, route: PostRoute[T]) -> None:
        self._context, self._route = context, route
        decoder_of(route.request)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = self._context
        if context.config.server.queue_while_loading and context.models is None:
            context.lifecycle.check_unless_passing(context.config.scheduler.max_num_queued_reqs)
        else:
            context.lifecycle.check()
        seat: Seat | None = scope["state"].get("seat")
        needs_seat = self._route.generates and context.models is None
        if needs_seat and seat is None:
            context.entrance.check()
        body = await read_json_body(scope, receive, context.config.server.max_request_bytes)
        request, ignored = decode_request(body, self._route.request, context.config.server.strict_requests)
        del body
        interval = context.config.server.sse_keep_alive_interval
        exchange = Exchange(scope, receive, send, context.lifecycle, interval)
        exchange.name_ignored(ignored)
        if needs_seat and seat is None:
            seat = context.entrance.seat()
        with seat or Seat() as exchange.seat:
            await exchange.run(self._answer(request, exchange))

    async def _answer(self, request: T, exchange: Exchange) -> None:
        context = self._context
        if context.models is not None:
            async with context.models.serving(request.model, exchange.key) as model:
                await self._answer_of(model, request, exchange)
            return
        if context.config.server.queue_while_loading:
            await context.lifecycle.passed()
        await self._route.handler(context, request, exchange)

    async def _answer_of(self, model: ServerContext, request: T, exchange: Exchange) -> None:
        """Of one of several."""
        if not self._route.generates:
            await self._route.handler(model, request, exchange)
            return
        with model.entrance.seat() as exchange.seat:
            await self._route.handler(model, request, exchange)


def create_app(context: ServerContext) -> Starlette:
    """Every route says what it asks for; what has no route needs a key all the same where keys are set."""
    app = Starlette(
        routes=_routes(context), middleware=_middleware(context), exception_handlers={404: _raise, 405: _raise}
    )
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def described_routes(app: Starlette) -> str:
    """For the log of a start."""
    methods: dict[str, list[str]] = {}
    for route in app.routes:
        assert isinstance(route, Route)
        methods.setdefault(route.path, []).extend(sorted((route.methods or set()) - {"HEAD"}))
    return ", ".join(f"{'|'.join(names)} {path}" for path, names in methods.items())


def _middleware(context: ServerContext) -> list[Middleware]:
    """Outermost first."""
    server = context.config.server
    found = [Middleware(RequestId, server.enable_request_id_headers), Middleware(Accounting, context)]
    if server.allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=server.allowed_origins,
            allow_credentials=server.allow_credentials,
            allow_methods=server.allowed_methods,
            allow_headers=server.allowed_headers,
            expose_headers=("x-request-id", "server-timing", "retry-after"),
        )
        found.append(cors)
    found.append(Middleware(Errors))
    found += [Middleware(plugins.middleware(name)) for name in server.middleware]
    if context.keys is not None:
        found.append(Middleware(Authentication, context.keys, context.metrics))
    elif (hosts := _local_hosts(server)) is not None:
        found.append(Middleware(HostCheck, hosts))
    return found


def _local_hosts(server: ServerConfig) -> LocalHosts | None:
    """None: any ``Host`` will do."""
    is_open = server.asks_for_keys or not is_loopback(server.host) or server.uds
    return None if is_open else LocalHosts((server.host,))


def door_of(context: ServerContext) -> Door:
    """It may refuse where ``_middleware`` and the routes do nothing that it does not."""
    server = context.config.server
    may_refuse = context.models is None and not server.allowed_origins and not server.middleware
    paths = [route.path for route in POST_ROUTES if route.generates]
    return Door(context, paths, _local_hosts(server), may_refuse=may_refuse)


def _routes(context: ServerContext) -> list[Route]:
    async def live(_: Request) -> Response:
        return _json(health.live())

    async def ready(_: Request) -> Response:
        status, body = health.ready(context)
        return _json(body, status, {} if status == 200 else {"retry-after": "2"})

    async def version(_: Request) -> Response:
        return _json(health.version())

    async def load(_: Request) -> Response:
        return _json(health.load(context))

    async def metrics(_: Request) -> Response:
        return Response(context.exposition.render(), headers={"content-type": CONTENT_TYPE})

    async def list_models(request: Request) -> Response:
        return _json(models.list_models(context, request.scope["state"].get("key")))

    async def get_model(request: Request) -> Response:
        return _json(models.get_model(context, request.path_params["id"], request.scope["state"].get("key")))

    async def load_model(request: Request) -> Response:
        return _json(await models.load_model(context, request.path_params["id"], request.scope["state"]["key"].name))

    async def unload_model(request: Request) -> Response:
        return _json(await models.unload_model(context, request.path_params["id"], request.scope["state"]["key"].name))

    async def get_timeline(request: Request) -> Response:
        key = request.scope["state"].get("key")
        page = context.timelines.find(key, request.path_params["id"])
        return Response(page, media_type="application/json")

    async def describe(_: Request) -> Response:
        return Response(description()[0], media_type="application/json")

    async def docs(_: Request) -> Response:
        return Response(description()[1], headers=DOCS_HEADERS, media_type="text/html")

    async def links(_: Request) -> Response:
        return _json(health.links())

    async def get_config(_: Request) -> Response:
        return _json(admin.live_config(context))

    async def patch_config(scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_body(scope, receive, context.config.server.max_request_bytes)
        changes, _ = decode_request(body, admin.ConfigChanges, strict=True)
        response = _json(admin.change_config(context, changes, scope["state"]["key"].name))
        await response(scope, receive, send)

    def get(path: str, access: Access, endpoint: Callable[[Request], Awaitable[Response]], *also: str) -> Route:
        return route(path, access, request_response(endpoint), "GET", *also)

    def post(path: str, access: Access, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
        return route(path, access, request_response(endpoint), "POST")

    def route(path: str, access: Access, endpoint: ASGIApp, *methods: str) -> Route:
        return Route(path, Guarded(path, access, context.keys is not None, endpoint), methods=list(methods))

    decoder_of(admin.ConfigChanges)
    described = []
    if not context.config.server.disable_docs:
        description()
        described = [get("/openapi.json", Access.INFER, describe), get("/docs", Access.INFER, docs)]
    return [
        *(route(each.path, Access.INFER, _Post(context, each), "POST") for each in POST_ROUTES),
        get("/", Access.PUBLIC, links),
        get("/live", Access.PUBLIC, live),
        get("/ready", Access.PUBLIC, ready),
        get("/health", Access.PUBLIC, ready),
        get("/ping", Access.PUBLIC, ready, "POST"),
        get("/admin/config", Access.ADMIN, get_config),
        route("/admin/config", Access.ADMIN, patch_config, "PATCH"),
        get("/version", Access.INFER, version),
        get("/load", Access.METRICS, load),
        get("/metrics", Access.METRICS, metrics),
        *described,
        get("/v1/requests/{id}/timeline", Access.INFER, get_timeline),
        get("/v1/models", Access.INFER, list_models),
        get("/v1/models/{id:path}", Access.INFER, get_model),
        post("/v1/models/{id:path}/load", Access.ADMIN, load_model),
        post("/v1/models/{id:path}/unload", Access.ADMIN, unload_model),
    ]


@cache
def description() -> tuple[bytes, str]:
    """What GET /openapi.json and GET /docs answer: made once, at the start, as all other requests wait meanwhile."""
    document = openapi(POST_ROUTES)
    return msgspec.json.encode(document), page(document)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


async def _raise(request: Request, error: Exception) -> Response:
    """Leaves the shape of Starlette's own errors to the middleware."""
    raise error
