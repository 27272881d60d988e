"""A stand-in for the API server: a child that uses the client directly and does what a test tells it over TCP.

A connection to the inherited socket says one line: ``PROMPT_LENGTH SEED MAX_TOKENS``. The reply is one token id a line,
then ``end``, or ``error: ...``; with ``pid`` before it, the process's id comes first. Or the line is an ``Ask`` as
JSON, and every line of the reply a ``ChoiceOutput`` as JSON, then ``end`` or ``error: CODE``. ``status`` is answered
with what the client knows, ``engines`` with a line for each engine, ``refused`` with a line of how many peers the head
and each engine have refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from array import array

import msgspec

from hybrid_serve.client import EngineDead, EngineRejected
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.config import Config
from hybrid_serve.wire import SamplingParams

refused_at_head = [0]  # what the client was told, the last the newest


class Ask(msgspec.Struct):
    prompt: list[int]
    params: SamplingParams
    n: int = 1


def main(
    config: Config,
    *,
    api_index: int,
    listen_fd: int,
    control_address: str,
    data_addresses: list[tuple[int, str]],
    launch: int,
    **_: object,
) -> None:
    client = ZmqEngineClient(config, api_index, control_address, data_addresses, launch=launch)
    asyncio.run(serve(config, listen_fd, client))


def refuse(config: Config, **_: object) -> None:
    raise RuntimeError("the stand-in fails as it was told to")


async def serve(config: Config, fd: int, client: ZmqEngineClient) -> None:
    loop = asyncio.get_running_loop()
    stop, cut, open_streams = asyncio.Event(), loop.create_future(), set[asyncio.Task[object]]()

    def on_shutdown(now: bool) -> None:
        stop.set()
        if now and not cut.done():
            cut.set_result(None)

    client.on_shutdown = on_shutdown
    client.on_refused = refused_at_head.append
    client.start()
    client.say_ready()

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
        restarts = sum(engine.status.restarts for engine in client.engines)
        running = sum(engine.stats.num_running for engine in client.engines)
        counts = f"{restarts} {client.group.num_replayed} {client.group.num_quarantined} {running}"
        writer.write(f"{client.status.phase} {os.getpid()} {counts}\n".encode())
    elif words == [b"engines"]:
        for engine in client.engines:
            counts = f"{engine.status.restarts} {engine.stats.num_running} {len(engine.streams)}"
            writer.write(f"{engine.status.phase} {counts}\n".encode())
    elif words == [b"refused"]:
        numbers = [refused_at_head[-1], *(engine.stats.num_refused for engine in client.engines)]
        writer.write(" ".join(map(str, numbers)).encode() + b"\n")
    elif words and words[0].startswith(b"{"):
        await answer_json(client, msgspec.json.decode(b" ".join(words), type=Ask), writer)
    else:
        if words[:1] == [b"pid"]:
            words.pop(0)
            writer.write(f"{os.getpid()}\n".encode())
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


async def answer_json(client: ZmqEngineClient, ask: Ask, writer: asyncio.StreamWriter) -> None:
    try:
        async with client.generate(array("i", ask.prompt).tobytes(), ask.params, n=ask.n) as stream:
            async for outputs in stream:
                writer.writelines(msgspec.json.encode(output) + b"\n" for output in outputs)
                await writer.drain()
        writer.write(b"end\n")
    except EngineDead:
        writer.write(b"error: engine_dead\n")
    except EngineRejected as error:
        writer.write(f"error: {error.code}\n".encode())
