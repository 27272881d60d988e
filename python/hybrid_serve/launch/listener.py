"""The HTTP socket: bound before anything is loaded, so that a busy port is known at once; inherited by API servers."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ServerConfig
from ..errors import StartupError
from .run_directory import LONGEST_SOCKET_PATH

if TYPE_CHECKING:
    import psutil

BACKLOG = 2048


@contextmanager
def listen(config: ServerConfig) -> Iterator[socket.socket]:
    """Listens as long as the block runs. Raises StartupError: HS-E031 if the port or unix socket is taken, HS-E032 for
    an address or path that cannot be had."""
    with _unix(config.uds) if config.uds else _tcp(config) as listener:
        try:
            yield listener
        finally:
            if config.uds:
                Path(config.uds).unlink(missing_ok=True)


def _tcp(config: ServerConfig) -> socket.socket:
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


def _unix(path: str) -> socket.socket:
    """Only this user can connect. A socket that nobody listens to any more is replaced."""
    length = len(os.fsencode(path))
    if length > LONGEST_SOCKET_PATH:
        why = f"its path has {length} bytes, a socket's may have {LONGEST_SOCKET_PATH}"
        raise StartupError("HS-E032", f"socket {path} cannot be bound", why, "--uds with a shorter path")
    _remove_dead(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        why, fix = os.strerror(error.errno or 0), "--uds with a path in a folder of yours"
        raise StartupError("HS-E032", f"socket {path} cannot be bound", why, fix) from error
    finally:
        os.umask(old)
    return listener


def _remove_dead(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            why, fix = "there is a file of another kind", "--uds with another path"
            raise StartupError("HS-E032", f"socket {path} cannot be bound", why, fix)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            fix = "--uds with another path"
            raise StartupError(
                "HS-E032", f"socket {path} cannot be bound", os.strerror(error.errno or 0), fix
            ) from error
    why, fix = "a process listens to it", "--uds with another path, or stop that process"
    raise StartupError("HS-E031", f"socket {path} is in use", why, fix)


def url(listener: socket.socket, scheme: str = "http") -> str:
    """Where clients on this machine reach it."""
    if listener.family == socket.AF_UNIX:
        return f"{scheme}+unix://{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


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
        while (parent := process.parent()) and _holds(parent, port):
            process = parent
        command = " ".join(os.path.basename(word) for word in process.cmdline()[:3]) or process.name()
        return f"pid {process.pid} ({command[:60]}, started {_ago(time.time() - process.create_time())} ago)"
    except psutil.Error:
        return ""


def _holds(process: psutil.Process, port: int) -> bool:
    import psutil

    try:
        return any(_listens(one, port) for one in process.net_connections("tcp"))
    except psutil.Error:  # another user's: what he has is not ours to see
        return False


def _listens(connection: Any, port: int) -> bool:
    return bool(connection.status == "LISTEN" and connection.laddr[1:] == (port,))


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
