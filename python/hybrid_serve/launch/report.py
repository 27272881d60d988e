"""What a person sees of a start: phases with seconds, then the URLs."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TextIO

from ..config import Config
from ..wire import EngineFacts, Status

NUM_PHASES = 4
log = logging.getLogger(__name__)


class Reporter(Protocol):
    """What the supervisor tells while it starts and stops a server; in this order."""

    def bound(self, url: str) -> None:
        """Where clients reach it; of headless engines, where their head is."""
        ...

    def status(self, status: Status) -> None:
        """The engine's, as it comes."""
        ...

    def ready(self) -> None: ...
    def draining(self, timeout: float) -> None: ...


class PlainReporter:
    """Lines of text; on a terminal also a share that is redrawn. Knows no process. Nobody need listen."""

    def __init__(self, config: Config, stream: TextIO | None = None, names: Sequence[str] = ()) -> None:
        """``names``: of the models; none: those of the configuration's model."""
        self._config, self._stream = config, stream or sys.stdout
        self._names = names or config.model.served_model_name or (config.model.model,)
        self._began = self._phase_began = time.monotonic()
        self._phase, self._url, self._is_share_drawn = "", "", False
        self._engine = -1  # of several, the one whose start is shown: all do the same
        self._facts: EngineFacts | None = None

    def bound(self, url: str) -> None:
        self._url = url
        text = f"ok, the head is asked at {url}" if self._config.parallel.headless else f"ok, {url} is bound"
        self._phase_line(1, "config", text)

    def status(self, status: Status) -> None:
        if self._engine < 0:
            self._engine = status.engine
        if status.engine != self._engine:
            return
        if status.phase == "loading_weights":
            self._draw_share(status.progress)
        elif status.phase == "allocating" and self._phase != "allocating":
            self._phase_line(2, "load", Path(self._config.model.model).name)
        elif status.phase == "ready" and status.facts is not None:
            self._facts = facts = status.facts
            tokens = facts.num_blocks * facts.block_size
            requests = f"{tokens // facts.max_model_len} requests of {facts.max_model_len}"
            count = len(self._config.parallel.local_ranks or self._config.parallel.remote_ranks)
            each = f", in each of {count} engines" if count > 1 else ""
            text = f"KV cache of {tokens} tokens = {requests}, {facts.dtype}, {facts.device}{each}"
            self._phase_line(3, "memory", text)
            if status.message:
                self._print(f"      note     {status.message}")
        self._phase = status.phase

    def ready(self) -> None:
        server, ranks = self._config.server, self._config.parallel.local_ranks
        self._phase_line(4, "server", "ok")
        if self._config.parallel.headless:
            self._print(f"ready in {self._seconds(self._began)}, as engines {list(ranks)} of the head at {self._url}.")
            return
        access = "with an API key" if server.asks_for_keys else "no key needed"
        self._print(f"  API      {self._url}/v1   model name: {', '.join(self._names)}")
        self._print(f"  Health   {self._url}/ready   Metrics {self._url}/metrics   ({access})")
        self._print(f"ready in {self._seconds(self._began)}. Ctrl-C = finish running requests, twice = stop now.")

    def draining(self, timeout: float) -> None:
        self._print(f"stopping: running requests have {timeout:g} s to finish. Ctrl-C = stop now.")

    def _phase_line(self, number: int, name: str, text: str) -> None:
        self._print(f"[{number}/{NUM_PHASES}] {name:<8} {text}   {self._seconds(self._phase_began)}")
        self._phase_began = time.monotonic()

    def _draw_share(self, share: float) -> None:
        if self._stream.isatty():
            self._write(f"\r[2/{NUM_PHASES}] load     {share:4.0%}")
            self._is_share_drawn = True

    def _print(self, line: str) -> None:
        if self._config.server.log_format == "json":  # then every line is an object, these too
            log.info("%s", " ".join(line.split()))
            return
        if self._is_share_drawn:
            line = f"\r\x1b[K{line}"
            self._is_share_drawn = False
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # `serve | head`: the server goes on, and has nothing left to flush when it ends
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    @staticmethod
    def _seconds(since: float) -> str:
        return f"{time.monotonic() - since:.1f} s"
