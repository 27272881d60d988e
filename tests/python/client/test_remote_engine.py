"""An engine on another machine, as the client sees it: over TCP, with an address that its status brings (S9, F-09)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import zmq

from engine_harness import ids, params, until
from fake_server import API, FIRST_ID, FakeServer
from hybrid_serve.client import ChoiceOutput
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.config import Config, ParallelConfig
from hybrid_serve.curve import Gate, make_key_file, read_key_file
from hybrid_serve.sockets import bind_router
from hybrid_serve.wire import AddRequest, EngineFacts, FinishReason, Kind, Status, pack, unpack

FACTS = EngineFacts(1000, 512, 16, 64, "float32", "cpu")


def test_when_the_connection_breaks_what_was_on_its_way_is_asked_for_again(tmp_path: Path) -> None:
    """ZMQ connects again by itself and says nothing of what it lost: no token may be missing for that."""
    keys = tmp_path / "keys"
    make_key_file(keys)
    parallel = ParallelConfig(data_parallel_size=2, data_parallel_size_local=1, data_parallel_key_file=str(keys))

    async def main() -> None:
        server = FakeServer(tmp_path)
        here = server.engines[0]

        def listen(address: str) -> zmq.Socket[bytes]:
            context = zmq.Context()  # the gate of which guards this socket alone
            return bind_router(context, address, Gate(context, read_key_file(keys)))

        there = listen("tcp://127.0.0.1:*")
        address = there.getsockopt_string(zmq.LAST_ENDPOINT)
        addresses = [(0, server.data_addresses[0]), (1, "")]
        client = ZmqEngineClient(Config(parallel=parallel), 3, server.control_address, addresses)
        client.start()
        try:
            await server.receive(server.control)
            server.tell(pack(Kind.STATUS, Status("ready", engine=0, facts=FACTS)))
            server.tell(pack(Kind.STATUS, Status("loading_weights", engine=1, address=address)))
            server.tell(pack(Kind.STATUS, Status("ready", engine=1, facts=FACTS, address=address)))
            for engine in (here, there):
                assert (await server.receive(engine))[1] == Kind.JOIN
            await until(lambda: client.status.phase == "ready" and client.facts is not None)
            async with client.generate(ids([1]), params(9), rank=1) as stream:
                assert (await server.receive(there))[1] == Kind.ADD
                server.engines[0] = there
                server.step([(0, 5, FinishReason.NONE)])
                assert await anext(stream) == [ChoiceOutput(0, [5])]
                there.context.destroy(linger=0)
                again = await server.receive(here)
                request = unpack(again[2], AddRequest)
                assert (request.id, request.num_generated, request.is_suspect) == (FIRST_ID, 1, False)
                there = listen(address)  # it lives, and is joined anew
                assert (await server.receive(there))[:2] == [API, Kind.JOIN]
                server.tell(pack(Kind.STATUS, Status("restarting", engine=0, restarts=1)))
                assert (await server.receive(there))[1] == Kind.ADD
                there.context.destroy(linger=0)  # and where there is no other, the same one is asked again
                there = listen(address)
                assert (await server.receive(there))[1] == Kind.JOIN
                assert unpack((await server.receive(there))[2], AddRequest).num_generated == 1
            there.context.destroy(linger=0)
        finally:
            client.close()
            server.context.destroy(linger=0)

    asyncio.run(asyncio.wait_for(main(), 30))
