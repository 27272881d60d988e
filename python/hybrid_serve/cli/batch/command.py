"""``hybrid-serve run-batch -i in.jsonl -o out.jsonl [MODEL] [OPTION ...]``.

The server is an ordinary one, on a loopback port that only this command has the key of: a batch is validated, run and
answered exactly as requests over HTTP are, on every route there is.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import threading
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice

from ... import logging as log_lines
from ...checkpoint import demo
from ...config import MAX_NUM_SEQS, Config, ServerConfig
from ...errors import StartupError, box
from ...wire import Status
from .. import options
from ..http_client import HttpClient
from ..progress import Progress
from ..usage import Parser, UsageError, dashed
from .drive import Driver
from .files import BatchInput, BatchOutput, Result

INTERRUPTED = 130
# What a batch keeps of the options of a server; the others are about clients, of whom there is one here.
_KEPT = (
    "log_format",
    "log_level",
    "max_logprobs",
    "max_request_bytes",
    "metrics_prefix",
    "shutdown_timeout",
    "strict_requests",
)


def run_batch(argv: list[str]) -> int:
    """0: every request has a result, whatever its status; 1: the output could not be written; 130: interrupted; others:
    how the server ended. All but 0 can be resumed."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(dashed(argv))
    chosen = options.parse(rest, os.environ)
    config = _private(options.for_one_model(chosen.config), chosen.origins)
    if config.parallel.headless:
        raise UsageError("--headless: a batch needs an API server")
    if not (arguments.input and arguments.output):
        raise UsageError("-i FILE and -o FILE must both be given")
    source = BatchInput(arguments.input)
    if not arguments.keep_going:
        source.refuse_problems()
    output = BatchOutput(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    try:
        done = output.count_done(source.requests())
        if done == source.total:
            print(f"{output.path}: all {done} results are there")
            return 0
        config = replace(config, model=demo.unless_named(config.model))
        server = config.server
        log_lines.configure(server.log_level, "run-batch", server.secrets, form=server.log_format)
        return _Batch(source, output, done, config, arguments.max_inflight or _enough(config)).run()
    except StartupError as error:
        print(box(error.failure), file=sys.stderr)
        return error.failure.exit_code
    finally:
        output.close()


def _parser() -> Parser:
    parser = Parser(
        "hybrid-serve run-batch",
        "Runs a file of requests in OpenAI's batch format, and writes their results in the same order.",
        "Further words are those of serve: a MODEL and its options (hybrid-serve serve --help).",
    )
    parser.usage = "hybrid-serve run-batch -i FILE -o FILE [MODEL] [OPTION ...]"
    parser.add_argument(
        "-i",
        "--input",
        "--input-file",
        metavar="FILE",
        help='requests: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}} a line',
    )
    parser.add_argument("-o", "--output", "--output-file", metavar="FILE", help="results, one a line")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where the output file ends, if it is there")
    again.add_argument("--overwrite", action="store_true", help="replace an output file that is there")
    parser.add_argument("--keep-going", action="store_true", help="a bad line becomes an error record, not a refusal")
    parser.add_argument(
        "--max-inflight", metavar="N", type=_count, help="requests sent at once; default: what keeps the engine busy"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _private(config: Config, origins: Mapping[str, str]) -> Config:
    """The configuration with a server that nobody else can use. Raises UsageError for a flag that would be ignored."""
    for field in fields(config.server):
        origin = origins.get(field.name, "")
        if origin.startswith("--") and field.name not in _KEPT:
            raise UsageError(f"{origin}: run-batch chooses it, its server is for nobody else")
    kept = {name: getattr(config.server, name) for name in _KEPT}
    server = ServerConfig(host="127.0.0.1", port=0, api_key=(secrets.token_hex(16),), **kept)
    return replace(config, server=server)


def _enough(config: Config) -> int:
    """As many requests as run at once, and as many that wait to follow them."""
    running, waiting = config.scheduler.max_num_seqs or MAX_NUM_SEQS, config.scheduler.max_num_queued_reqs
    return running + min(running, waiting or running)


@dataclass
class _Counts:
    ok: int = 0
    refused: int = 0


class _Batch:
    """The server in this thread (signals are its own), the driver in another; a ``launch.report.Reporter``."""

    def __init__(self, source: BatchInput, output: BatchOutput, done: int, config: Config, max_inflight: int) -> None:
        self._source, self._output, self._done, self._config = source, output, done, config
        self._max_inflight, self._counts = max_inflight, _Counts()
        self._driver: Driver | None = None
        self._thread = threading.Thread(target=self._drive, name="batch")
        self._error: BaseException | None = None
        self._url, self._phase, self._is_draining = "", "", False

    def run(self) -> int:
        """Raises StartupError if the server cannot start, or dies."""
        from ...launch import supervisor

        print(f"{self._source.path}: {self._source.total} requests, {self._done} done", file=sys.stderr)
        # The driver may finish in the moment in which the supervisor, and with it its own handler, ends.
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            code = supervisor.serve(self._config, self)
        finally:
            if self._driver is not None:
                self._driver.stop()
            if self._thread.ident is not None:
                self._thread.join()
            signal.signal(signal.SIGTERM, handler)
            self._say_how_far()
        if isinstance(self._error, OSError):
            print(f"run-batch: {self._output.path}: {self._error.strerror}", file=sys.stderr)
            return 1
        if self._error is not None:
            raise self._error
        if self._done < self._source.total:
            return code or INTERRUPTED
        return 0

    # Reporter

    def bound(self, url: str) -> None:
        self._url = url

    def status(self, status: Status) -> None:
        if status.phase != self._phase:
            self._phase = status.phase
            print(f"{status.phase.replace('_', ' ')} {status.message}".rstrip(), file=sys.stderr)

    def ready(self) -> None:
        if self._driver is not None:
            return  # ready again
        client = HttpClient(self._url, self._config.server.api_key[0])
        self._driver = Driver(client, self._max_inflight, self._take)
        self._thread.start()

    def draining(self, timeout: float) -> None:
        self._is_draining = True
        if self._driver is not None:
            self._driver.stop()

    # The driver's thread

    def _drive(self) -> None:
        assert self._driver is not None
        left = islice(self._source.requests(), self._done, None)
        try:
            with Progress("run-batch", self._source.total, self._done) as self._progress:
                asyncio.run(self._driver.run(left))
        except BaseException as error:
            self._error = error
        if not self._is_draining:  # a second signal would end it by force
            os.kill(os.getpid(), signal.SIGTERM)  # the server's own way to end

    def _take(self, results: list[Result]) -> None:
        if not results:
            return
        self._output.append(results)
        self._done += len(results)
        self._progress.add(len(results))
        for result in results:
            if result.response is not None and result.response.status_code == 200:
                self._counts.ok += 1
            else:
                self._counts.refused += 1

    def _say_how_far(self) -> None:
        line = f"{self._output.path}: {self._done} of {self._source.total} results"
        if self._counts.ok or self._counts.refused:
            line += f"; of this run {self._counts.ok} answered, {self._counts.refused} with an error"
        if self._done < self._source.total:
            line += "; the same command with --resume does the rest"
        print(line, file=sys.stderr)
