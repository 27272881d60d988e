"""The first code of every child: ties its life to the parent's, runs the entry point, reports how that failed."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import signal
import socket
import sys
import threading
from importlib import import_module

import zmq
from setproctitle import setproctitle

from ..errors import StartupError, lack_of_memory
from ..logging import configure
from ..sockets import connect_dealer
from ..wire import LAST_WORDS_OF, Kind, StartupFailure, pack
from .local import Order, read_order

log = logging.getLogger(__name__)
ENGINE_FAILED = 20
REPORT_MS = 2000  # how long the last words may take to reach the supervisor


def main() -> None:
    """``sys.argv[1]``: the file descriptor of the socket pair to the parent."""
    life = socket.socket(fileno=int(sys.argv[1]))
    life.set_inheritable(False)
    # The supervisor alone decides when a child ends, also where a service manager signals every process at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()  # a crash in native code shows the Python stack
    try:
        order = read_order(life)
    except EOFError:
        raise SystemExit(1) from None
    spec, server = order.spec, order.config.server
    setproctitle(f"hybrid-serve: {spec.name}")
    configure(server.log_level, spec.name, server.secrets, form=server.log_format)
    threading.Thread(target=_end_with_parent, args=(life, order.run_directory), daemon=True).start()
    raise SystemExit(_run(order))


def _end_with_parent(life: socket.socket, run_directory: str) -> None:
    while life.recv(1):
        pass
    # Nobody else is left to remove the sockets; the parent itself does it before it closes this pair.
    shutil.rmtree(run_directory, ignore_errors=True)
    os._exit(1)


def _run(order: Order) -> int:
    spec = order.spec
    try:
        module, _, function = spec.entry.partition(":")
        getattr(import_module(module), function)(order.config, **spec.arguments)
        return 0
    except StartupError as error:
        failure = error.failure
        log.debug("%s could not start", spec.name, exc_info=True)
    except Exception as error:
        lack = lack_of_memory(spec.name, error)
        if lack is None:
            log.exception("%s failed", spec.name)
            what, why, fix = (
                f"{spec.name} failed",
                f"{type(error).__name__}: {error}",
                "the log above has the traceback",
            )
            failure = StartupFailure("HS-E200", what, why, fix, ENGINE_FAILED)
        else:
            failure = lack.failure
            log.debug("%s has too little memory", spec.name, exc_info=True)
    _report(order, failure)
    return failure.exit_code


def _report(order: Order, failure: StartupFailure) -> None:
    # Another connection than the entry point's own, which may be broken or closed.
    context = zmq.Context()
    control = connect_dealer(context, order.spec.arguments["control_address"], LAST_WORDS_OF + order.spec.identity)
    control.send_multipart(pack(Kind.FAILED, failure))
    control.close(linger=REPORT_MS)
    context.term()
