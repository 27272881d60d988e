"""ZMQ sockets with the options that every one of ours has. Knows no frame and no process."""

from __future__ import annotations

from typing import Any

import zmq

from .wire import MAX_FRAME_BYTES

RECONNECT_MS = 20  # a peer that is just starting is found this soon


def bind_router(context: zmq.Context[Any], address: str) -> zmq.Socket[bytes]:
    """A ROUTER that refuses frames above MAX_FRAME_BYTES and raises EHOSTUNREACH for a peer that is gone."""
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    _set_common(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A process that takes another's place may connect before the other's connection is seen to be gone.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    socket.bind(address)
    return socket


def connect_dealer(context: zmq.Context[Any], address: str, identity: bytes) -> zmq.Socket[bytes]:
    """A DEALER that the ROUTER at ``address`` knows as ``identity``; that end may still be to come."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    _set_common(socket)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.connect(address)
    return socket


def _set_common(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    # What waits to be sent is bounded by the requests that run; a limit here would lose or block one of their messages.
    # The receiving side keeps its limit, so that whoever floods a socket holds the flood himself.
    socket.setsockopt(zmq.SNDHWM, 0)


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message can be received now. Must be asked after a send, too, where a loop waits on the socket's file
    descriptor: that one signals changes, and a send can swallow one."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
