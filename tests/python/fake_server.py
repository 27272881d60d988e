"""The other ends of a client's sockets, for tests of the client alone."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zmq

from engine_harness import until
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.client.open_counts import OpenCounts
from hybrid_serve.config import Config
from hybrid_serve.session import Session, Stamp
from hybrid_serve.shared_memory import OPEN_SLOT_BYTES
from hybrid_serve.sockets import bind_router
from hybrid_serve.wire import FinishReason, Hello, Kind, StepHeader, api_identity, pack, unpack

API = api_identity(3)
FIRST_ID = 3 << 48


class FakeServer:
    """The other ends of a client's sockets; engine and supervisor are whatever the test makes of them."""

    def __init__(self, directory: Path, num_engines: int = 1) -> None:
        self.context = zmq.Context()
        self.control_address = f"ipc://{directory}/control"
        self.data_addresses = [f"ipc://{directory}/engine-{index}" for index in range(num_engines)]
        self.control = bind_router(self.context, self.control_address)
        self.engines = [bind_router(self.context, address) for address in self.data_addresses]
        self.sessions: dict[zmq.Socket[bytes], Session] = {}  # as of the last JOIN
        self.open_memory = memoryview(bytearray(4 * OPEN_SLOT_BYTES))
        addresses, open_counts = list(enumerate(self.data_addresses)), OpenCounts(self.open_memory, 3)
        self.client = ZmqEngineClient(Config(), 3, self.control_address, addresses, open_counts=open_counts)

    async def receive(self, socket: zmq.Socket[bytes]) -> list[bytes]:
        """Identity, kind, header and arrays; an engine's stamp is checked and cut off."""
        await until(lambda: bool(socket.poll(0)), "the client sent nothing")
        identity, first, *rest = socket.recv_multipart()
        if socket is self.control:
            return [identity, first, *rest]
        stamp = Stamp.of(first)
        if stamp.kind == Kind.JOIN:
            self.sessions[socket] = Session(stamp.session)
        self.sessions[socket].take(stamp, rest)
        return [identity, stamp.kind, *rest]

    def send(self, message: list[Any], engine: int = 0) -> None:
        socket = self.engines[engine]
        self.send_raw(self.sessions[socket].stamped(message), engine)

    def send_raw(self, frames: list[Any], engine: int = 0) -> None:
        self.engines[engine].send_multipart([API, *frames])

    def tell(self, message: list[Any]) -> None:
        self.control.send_multipart([API, *message])

    def step(self, rows: list[tuple[int, int, FinishReason]], engine: int = 0) -> None:
        """(choice, token, reason) by row."""
        self.send(
            pack(
                Kind.STEP,
                StepHeader(1, len(rows), 0),
                array("Q", [FIRST_ID + choice for choice, _, _ in rows]),
                array("i", [token for _, token, _ in rows]),
                bytes(reason for _, _, reason in rows),
                array("i", [-1] * len(rows)),
                array("i", [0] * len(rows)),
                array("q", [-1] * len(rows)),
            ),
            engine,
        )


def with_server(tmp_path: Path, test: Callable[[FakeServer], Awaitable[None]], num_engines: int = 1) -> None:
    async def main() -> None:
        server = FakeServer(tmp_path, num_engines)
        server.client.start()
        try:
            hello = await server.receive(server.control)
            assert hello[:2] == [API, Kind.HELLO]
            assert unpack(hello[2], Hello).config_digest == Config().digest()
            for engine in server.engines:
                assert (await server.receive(engine))[:2] == [API, Kind.JOIN]
            await asyncio.wait_for(test(server), 10)
        finally:
            server.client.close()
            server.context.destroy(linger=0)

    asyncio.run(main())


def ids_of(*numbers: int) -> bytes:
    return array("Q", numbers).tobytes()
