"""A server of several models: API servers, a shelf, and a keeper with engines for each model that is in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TextIO

import msgspec

from ..config import Config
from ..live import LiveOptions
from ..served import ServedModel
from ..shared_memory import SharedMemory, shared
from ..wire import Status
from . import listener
from .plan import API_ENTRY, LOAD, Front, api_servers
from .reload import Reload
from .report import PlainReporter
from .run_directory import RunDirectory
from .shelf import Shelf
from .supervisor import Supervisor


def serve(
    config: Config,
    models: Sequence[ServedModel],
    read: Callable[[], Config] | None = None,
    load: str = LOAD,
    api_entry: str = API_ENTRY,
) -> int:
    """As ``supervisor.serve``. That a model cannot be loaded ends nothing."""
    reporter = ModelsReporter(config, models)
    num_api_servers = config.server.api_server_count
    with listener.listen(config.server) as http, RunDirectory() as directory, shared(num_api_servers) as shared_fd:
        reporter.bound(listener.url(http, "https" if config.server.ssl_certfile else "http"))
        shelf = Shelf(config, models, directory, load)
        arguments = {"data_addresses": [], "models": msgspec.to_builtins(list(models))}
        specs = api_servers(config, directory, Front(http.fileno(), shared_fd), arguments, api_entry)
        supervisor = Supervisor(config, directory, specs, reporter, shelf)
        supervisor.reload = Reload(config, read, LiveOptions(SharedMemory(shared_fd, num_api_servers)))
        try:
            return supervisor.run()
        finally:
            supervisor.close()
            shelf.close()


class ModelsReporter(PlainReporter):
    """Names the models; of their engines only whether they were loaded."""

    def __init__(self, config: Config, models: Sequence[ServedModel], stream: TextIO | None = None) -> None:
        super().__init__(config, stream or sys.stdout, [model.name for model in models])
        self._name_of = {index: model.name for model in models for index in model.engines}

    def status(self, status: Status) -> None:
        if status.phase == "ready":
            self._phase_line(2, "load", f"{self._name_of[status.engine]} ok")
        elif status.phase == "failed":
            self._phase_line(2, "load", f"{self._name_of[status.engine]} failed: {status.message}")
