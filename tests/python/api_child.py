"""A stand-in for the API server: a child that uses the client directly and does what a test tells it over TCP.

A connection to the inherited socket says one line: ``PROMPT_LENGTH SEED MAX_TOKENS``. The reply is one token id a line,
then ``end``, or ``error: ...``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from array import array

from hybrid_serve.client import EngineDead, EngineRejected
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.config import Config
from hybrid_serve.wire import SamplingParams


def main(
    config: Config, *, api_index: int, listen_fd: int, control_address: str, data_addresses: list[str], **_: object
) -> None:
    asyncio.run(serve(config, api_index, listen_fd, control_address, data_addresses))


def refuse(config: Config, **_: object) -> None:
    raise RuntimeError("the stand-in fails as it was told to")


async def serve(config: Config, api_index: int, fd: int, control_address: str, data_addresses: list[str]) -> None:
    loop = asyncio.get_running_loop()
    stop, cut, open_streams = asyncio.Event(), loop.create_future(), set[asyncio.Task[object]]()

    def on_shutdown(now: bool) -> None:
        stop.set()
        if now and not cut.done():
            cut.set_result(None)

    client = ZmqEngineClient(config, api_index, control_address, data_addresses, on_shutdown=on_shutdown)
    client.start()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_streams.add(task)
        with contextlib.suppress(ConnectionError):
            await answer(client, reader, writer)
        open_streams.discard(task)

    server = await asyncio.start_server(connected, sock=socket.socket(fileno=fd))
    await stop.wait()
    running = asyncio.gather(*open_streams)
    await asyncio.wait([running, cut], timeout=config.server.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    client.close()


async def answer(client: ZmqEngineClient, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    words = (await reader.readline()).split()
    if words == [b"status"]:
        writer.write(f"{client.status.phase} {os.getpid()}\n".encode())
    else:
        length, seed, max_tokens = map(int, words)
        params = SamplingParams(max_tokens=max_tokens, seed=seed)
        try:
            async with client.generate(array("i", range(length)).tobytes(), params) as stream:
                async for outputs in stream:
                    writer.writelines(f"{token}\n".encode() for output in outputs for token in output.token_ids)
                    await writer.drain()
            writer.write(b"end\n")
        except (EngineDead, EngineRejected) as error:
            writer.write(f"error: {type(error).__name__}: {error}\n".encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()
