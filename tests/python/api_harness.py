"""An API server without sockets and without an engine: the real application over a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx

from demo_model import demo_template, demo_tokenizer
from fake_engine import Call, FakeEngine
from hybrid_serve.config import Config, ModelConfig, ServerConfig
from hybrid_serve.server.app import create_app
from hybrid_serve.server.context import ServerContext, TextModel
from hybrid_serve.shared_memory import SharedMemory

T = TypeVar("T")
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Written down here a second time on purpose: opening a route to everyone takes two hands.
PUBLIC = {"/", "/live", "/ready", "/health", "/ping"}
REPLY = "Hello, this is a wörld of 😀 text."


def says(text: str) -> Callable[[Call, int], Sequence[int]]:
    """A script in which every choice is this text."""
    ids = demo_tokenizer().encode(text)
    return lambda call, choice: ids


class Api:
    """One server, on an event loop of its own."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        template: bool = True,
        seed: int = -1,
        memory: SharedMemory | None = None,
        index: int = 0,
        **server: Any,
    ) -> None:
        """``memory``: with other servers, of which this is number ``index``."""
        self.engine = engine or FakeEngine(says(REPLY))
        config = Config(model=ModelConfig(model="demo", seed=seed), server=ServerConfig(**server))
        self.context = ServerContext(config, self.engine, index, memory)
        self.context.set_text_model(TextModel(demo_tokenizer(), demo_template() if template else None))
        self.app = create_app(self.context)
        self.loop = asyncio.new_event_loop()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    def post(self, path: str, body: dict[str, Any] | bytes, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        return self.run(self.client.post(path, content=content, headers=sent))

    def get(self, path: str, **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.run(self.client.get(path, headers=sent))

    def chat(self, **fields: Any) -> dict[str, Any]:
        """The body of a chat completion that must succeed."""
        return self._ok(self.post(CHAT, {"messages": MESSAGES} | fields))

    def complete(self, prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
        return self._ok(self.post(COMPLETIONS, {"prompt": prompt} | fields))

    def stream(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream that must succeed, without the closing ``[DONE]``."""
        default = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
        response = self.post(path, default | {"stream": True} | fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = events_of(response.text)
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    @staticmethod
    def _ok(response: httpx.Response) -> dict[str, Any]:
        assert response.status_code == 200, response.text
        body = response.json()
        assert isinstance(body, dict)
        return body

    def close(self) -> None:
        self.run(self.client.aclose())
        self.context.close()
        self.loop.close()


def events_of(text: str) -> list[str]:
    """The data of server-sent events, which are framed as the standard says."""
    assert text.endswith("\n\n")
    events = text[:-2].split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events if not event.startswith(":"))
    return [event[6:] for event in events if not event.startswith(":")]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    """What a stream gave one choice."""
    texts = []
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index:
                texts.append(choice["delta"]["content"] if "delta" in choice else choice["text"])
    return "".join(texts)


def routes(api: Api) -> list[tuple[str, str]]:
    """(method, path) of everything that the application answers."""
    found = []
    for route in api.app.routes:
        path = str(getattr(route, "path", "")).replace("{id:path}", "demo").replace("{id}", "demo")
        found += [(method, path) for method in sorted(getattr(route, "methods", None) or ()) if method != "HEAD"]
    return found
