"""The HTTP socket: bound before anything is loaded, so that a busy port is known at once; inherited by API servers."""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Any

from ..config import ServerConfig
from ..errors import StartupError

BACKLOG = 2048


def listen(config: ServerConfig) -> socket.socket:
    """Raises StartupError: HS-E031 if the port is taken, HS-E032 for an address or port that cannot be had."""
    host = config.host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise StartupError("HS-E032", f"host {host} is not known", error.strerror or "", "--host 127.0.0.1") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # At once: until one of two sockets listens, Linux lets both bind the port. And early clients wait, not fail.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_bind(config, error) from error
    return listener


def url(listener: socket.socket) -> str:
    """Where clients on this machine reach it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _cannot_bind(config: ServerConfig, error: OSError) -> StartupError:
    if error.errno == errno.EADDRINUSE:
        what, fix = f"port {config.port} is in use", f"--port {config.port + 1 if config.port < 65535 else 0}"
        holder = port_holder(config.port)
        why = f"by {holder}" if holder else "by a process that this user may not see"
        return StartupError("HS-E031", what, why, f"{fix}, or stop that process")
    what = f"{config.host} port {config.port} cannot be bound"
    fix = "--port 8000" if error.errno == errno.EACCES else "--host 127.0.0.1"
    return StartupError("HS-E032", what, os.strerror(error.errno or 0), fix)


def port_holder(port: int) -> str:
    """Who listens on the port: ``pid 4711 (python3 server.py, started 2 h ago)``; empty if that cannot be seen."""
    import psutil  # only for this message

    try:
        pids = [one.pid for one in psutil.net_connections("tcp") if _listens(one, port) and one.pid]
        if not pids:
            return ""
        process = psutil.Process(pids[0])
        # Children inherit the socket: the eldest is the one to stop.
        while (parent := process.parent()) and any(_listens(one, port) for one in parent.net_connections("tcp")):
            process = parent
        command = " ".join(os.path.basename(word) for word in process.cmdline()[:3]) or process.name()
        return f"pid {process.pid} ({command[:60]}, started {_ago(time.time() - process.create_time())} ago)"
    except psutil.Error:
        return ""


def _listens(connection: Any, port: int) -> bool:
    return bool(connection.status == "LISTEN" and connection.laddr[1:] == (port,))


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
