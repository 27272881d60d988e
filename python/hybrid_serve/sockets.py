"""ZMQ sockets with the options that every one of ours has. Knows no frame and no process."""

from __future__ import annotations

from typing import Any

import zmq

from .curve import HANDSHAKE_MS, Gate, Keys
from .wire import MAX_FRAME_BYTES

RECONNECT_MS = 20  # a peer that is just starting is found this soon
RECONNECT_MAX_MS = 1000  # over a network, after several tries
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2000, 10000  # over a network: a machine that is gone says nothing more


def bind_router(context: zmq.Context[Any], address: str, gate: Gate | None = None) -> zmq.Socket[bytes]:
    """A ROUTER that refuses frames above MAX_FRAME_BYTES and raises EHOSTUNREACH for a peer that is gone. ``gate``: of
    the context; nothing is bound to an address of a network without."""
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    _set_common(socket, address, gate.keys if gate is not None else None)
    if gate is not None:
        gate.guard(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A process that takes another's place may connect before the other's connection is seen to be gone.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    try:
        socket.bind(address)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def connect_dealer(
    context: zmq.Context[Any], address: str, identity: bytes, keys: Keys | None = None
) -> zmq.Socket[bytes]:
    """A DEALER that the ROUTER at ``address`` knows as ``identity``; that end may still be to come."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    _set_common(socket, address, keys)
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public.encode())
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.connect(address)
    return socket


def bind_pull(context: zmq.Context[Any], address: str) -> zmq.Socket[bytes]:
    """Within one machine."""
    socket: zmq.Socket[bytes] = context.socket(zmq.PULL)
    _set_common(socket, address, None)
    socket.bind(address)
    return socket


def connect_push(context: zmq.Context[Any], address: str) -> zmq.Socket[bytes]:
    """To a PULL of the same machine, which may still be to come."""
    socket: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    _set_common(socket, address, None)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.connect(address)
    return socket


def tcp_address(host: str, port: int | str) -> str:
    host = host.strip("[]")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _set_common(socket: zmq.Socket[bytes], address: str, keys: Keys | None) -> None:
    if address.startswith("tcp:") and keys is None:
        socket.close()
        raise ValueError(f"{address} is open to a network and needs keys")
    if keys is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.IPV6, int("[" in address))
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    # What waits to be sent is bounded by the requests that run; a limit here would lose or block one of their messages.
    # The receiving side keeps its limit, so that whoever floods a socket holds the flood himself.
    socket.setsockopt(zmq.SNDHWM, 0)


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message can be received now. Must be asked after a send, too, where a loop waits on the socket's file
    descriptor: that one signals changes, and a send can swallow one."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
