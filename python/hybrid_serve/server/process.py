"""The API server's process: serves from the first moment, loads its text side meanwhile, drains when told to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import resource
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import msgspec
import uvicorn
import uvloop

from ..checkpoint.hub import resolve
from ..client.engine_client import ZmqEngineClient
from ..client.models_client import ModelsClient
from ..client.open_counts import OpenCounts
from ..config import Config
from ..served import ServedModel
from ..shared_memory import SharedMemory
from ..text.loading import load_chat_template, load_tokenizer, locate_tokenizer
from .accept import FairAcceptor
from .app import create_app, described_routes, door_of
from .connection import SPARE_CONNECTIONS, BoundedProtocol, HeaderBounds
from .context import ServerContext, TextModel
from .door import Door
from .file_watch import Watched, watch
from .several import Models
from .shared_counts import SharedCounts, publish
from .tls import Certificate, certificate
from .tracing import tracing

log = logging.getLogger(__name__)
T = TypeVar("T")
_LAST_WRITES_SECONDS = 2
_HANDSHAKE_SECONDS = 10
MOST_FILES = 2**20
OWN_FILES = 64 + SPARE_CONNECTIONS  # sockets to the engine, the log, model files while they load


class HttpServer(uvicorn.Server):
    """uvicorn on a socket that is bound already; signals are the supervisor's."""

    def __init__(self, config: uvicorn.Config, header_bounds: HeaderBounds, door: Door, shared: SharedCounts) -> None:
        """``shared``: with the API servers that have the same socket."""
        super().__init__(config)
        self.header_bounds, self.door, self.shared = header_bounds, door, shared
        self.servers: list[asyncio.Server] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own would leave a TLS handshake a minute to take the server's time, and uvloop's accepts one
        connection a turn: of a burst the last would wait for as many turns."""
        await self.lifespan.startup()
        of_uvicorn = self.config, self.server_state, self.lifespan.state
        make = functools.partial(BoundedProtocol, *of_uvicorn, header_bounds=self.header_bounds, door=self.door)
        seconds = _HANDSHAKE_SECONDS if self.config.ssl else None
        acceptors = [
            FairAcceptor(each, make, self.shared, self._num_connections, self.config.ssl, seconds)
            for each in sockets or ()
        ]
        self.servers = cast(list[asyncio.Server], acceptors)
        self.door.is_behind = lambda: any(acceptor.is_behind for acceptor in acceptors)
        self.started = True

    def _num_connections(self) -> int:
        return len(self.server_state.connections)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(context: ServerContext, certificate: Certificate | None = None) -> HttpServer:
    server, app = context.config.server, create_app(context)
    if context.api_index == 0:  # the others have the same
        log.info("routes: %s", described_routes(app))
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        root_path=server.root_path,
        timeout_keep_alive=server.keep_alive_timeout,
        timeout_graceful_shutdown=_LAST_WRITES_SECONDS,
        ssl_context_factory=(lambda *_: certificate.context) if certificate else None,
    )
    bounds = HeaderBounds(server.max_header_bytes, server.max_headers)
    return HttpServer(config, bounds, door_of(context), context.counts)


def watched_files(context: ServerContext, certificate: Certificate | None) -> list[Watched]:
    """What the configuration says may change while the server runs."""
    found = []
    if context.keys is not None and context.keys.file is not None:
        found.append(Watched("key file", [context.keys.file], context.keys.reload))
    if certificate is not None and context.config.server.enable_ssl_refresh:
        found.append(Watched("certificate", certificate.paths, certificate.reload))
    return found


def main(
    config: Config,
    api_index: int,
    listen_fd: int,
    shared_fd: int,
    control_address: str,
    data_addresses: Sequence[tuple[int, str]],
    launch: int,
    models: Sequence[dict[str, Any]] = (),
) -> None:
    """Returns when the server was told to shut down and has. ``models``: each a ``ServedModel``, where there are
    several. Raises ``StartupError``."""
    listener, memory = socket.socket(fileno=listen_fd), SharedMemory(shared_fd, config.server.api_server_count)
    open_counts = OpenCounts(memory.open, api_index)
    open_counts.clear()
    if models:
        served = msgspec.convert(models, list[ServedModel])
        client = ModelsClient(config, api_index, control_address, served, open_counts, launch=launch)
        uvloop.run(_serve_several(config, client, served, api_index, listener, memory))
    else:
        only = ZmqEngineClient(
            config, api_index, control_address, data_addresses, launch=launch, open_counts=open_counts
        )
        uvloop.run(_serve_one(config, only, api_index, listener, memory))


def raise_file_limit() -> int:
    """As many open files as the system lets this process have; of these, how many may be connections of clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, most - OWN_FILES)


async def _serve_one(
    config: Config, client: ZmqEngineClient, api_index: int, listener: socket.socket, memory: SharedMemory
) -> None:
    context = ServerContext(config, client, api_index, memory)
    context.tracing = tracing(config.server)
    client.on_status, client.group.on_replay = context.status_changed, context.metrics.replayed
    client.on_refused = context.metrics.refused
    context.lifecycle.on_ready = client.say_ready
    await _serve(context, client, listener, lambda: _in_daemon_thread(lambda: load_text_model(config)))


async def _serve_several(
    config: Config,
    client: ModelsClient,
    models: Sequence[ServedModel],
    api_index: int,
    listener: socket.socket,
    memory: SharedMemory,
) -> None:
    context = ServerContext(config, client.models[models[0].name], api_index, memory)
    context.tracing = tracing(config.server)
    gates = Models(context, client, models, lambda config: _in_daemon_thread(lambda: load_text_model(config)))
    client.on_status = gates.status_changed
    for each in client.models.values():
        each.group.on_replay = context.metrics.replayed
    await _serve(context, client, listener, asyncio.get_running_loop().create_future)


async def _serve(
    context: ServerContext,
    client: ZmqEngineClient | ModelsClient,
    listener: socket.socket,
    load: Callable[[], asyncio.Future[TextModel]],
) -> None:
    """``load``: begins with what is to be there from the start."""
    config, counts = context.config, context.counts
    certified = certificate(config.server)
    server = http_server(context, certified)
    BoundedProtocol.max_connections = raise_file_limit()
    stopping = Stopping(context, server)
    client.on_shutdown = stopping.begin
    context.metrics.add(counts.own())
    context.exposition.others = counts.others
    client.start()
    context.take_news()
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    loading = load()
    watching = asyncio.ensure_future(watch(watched_files(context, certified), context.metrics.num_reloads))
    publishing = asyncio.ensure_future(publish(counts, context))
    try:
        ends: set[asyncio.Future[Any]] = {serving, loading}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            context.set_text_model(loading.result())
            log.debug("tokenizer and chat template are loaded")
            # What was loaded stays: keeping it out of collections makes their pauses short.
            gc.collect()
            gc.freeze()
        await serving
    finally:
        server.should_exit = True
        loading.cancel()
        watching.cancel()
        await asyncio.wait({serving, watching})
        publishing.cancel()
        await asyncio.wait({publishing})
        client.close()
        context.close()


def load_text_model(config: Config) -> TextModel:
    """The tokenizer and template of the configured model. Raises ``StartupError``."""
    given = config.model.tokenizer
    path = locate_tokenizer(given, config.model) if given else resolve(config.model).path
    tokenizer = load_tokenizer(path)
    return TextModel(tokenizer, load_chat_template(tokenizer, config.model.chat_template))


def _in_daemon_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """A thread that a shutdown need not wait for: it may be downloading."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, daemon=True, name="load-text").start()
    return future


class Stopping:
    """From the first word of a shutdown to the last byte; knows phases, not requests."""

    def __init__(self, context: ServerContext, server: uvicorn.Server) -> None:
        self._context, self._server = context, server
        self._task: asyncio.Task[None] | None = None

    def begin(self, now: bool) -> None:
        """``now``: running requests get an error instead of time. The socket stays open meanwhile: who comes late is
        told so (503, ``draining``) instead of being refused a connection."""
        lifecycle = self._context.lifecycle
        if now:
            lifecycle.cut_now()
        else:
            lifecycle.begin_drain()
        if self._task is None:
            self._task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        lifecycle = self._context.lifecycle
        try:
            if not await lifecycle.drained(self._context.config.server.shutdown_timeout):
                log.warning("%d requests were cut by the shutdown", lifecycle.num_open)
                await lifecycle.drained(_LAST_WRITES_SECONDS)
        finally:
            self._server.should_exit = True
