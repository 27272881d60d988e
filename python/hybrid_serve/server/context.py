"""What every endpoint is given: a model's names, engine client and text side, its server's metrics and lifecycle."""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from .. import logging as log_lines
from .. import shared_memory
from ..client import Engine, EngineClient
from ..client.open_counts import OpenCounts
from ..config import Config
from ..live import LiveOptions, value_of, with_values
from ..shared_memory import SharedMemory
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import Tokenizer
from ..wire import EngineFacts, Status
from .entrance import Entrance
from .errors import ApiError
from .exposition import Exposition, OfModel
from .headers import RANK_HEADER
from .key_use import KeyUse
from .keys import Key, KeyRing, key_ring
from .lifecycle import Lifecycle
from .metrics import Metrics
from .plugins import redactor
from .shared_counts import SharedCounts
from .timeline import Timelines
from .turns import Turns

# Above this many characters work on a text leaves the event loop (some 5 ms of tokenising).
_INLINE_CHARS = 16_384
if TYPE_CHECKING:
    from .several import Models
    from .tracing import Tracing

T = TypeVar("T")


@dataclass(frozen=True)
class TextModel:
    """The two halves of the text side."""

    tokenizer: Tokenizer
    template: ChatTemplate | None


@dataclass
class ServerContext:
    """One API server, or one of several models in it; knows no route."""

    config: Config
    client: EngineClient
    api_index: int = 0
    memory: SharedMemory | None = None  # with other API servers; none: alone
    text_model: TextModel | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    front: ServerContext | None = None  # of one of several models: the server's

    def __post_init__(self) -> None:
        self.lifecycle = Lifecycle(self.client)
        self.models: Models | None = None  # of the front
        self.model_names = self.config.model.served_model_name or (self.config.model.model,)
        self.started_with = self.config
        self.fingerprint = f"fp_{self.config.digest()[:12]}"
        seed = self.config.model.seed
        self._seeds = random.Random(seed + self.api_index) if seed >= 0 else None
        front, server = self.front, self.config.server
        memory = front.live.memory if front else self.memory or SharedMemory(shared_memory.make(1), 1)
        self.live: LiveOptions = LiveOptions(memory)
        self.keys: KeyRing | None = front.keys if front else key_ring(server, KeyUse(memory, self.api_index))
        self.metrics: Metrics = front.metrics if front else Metrics()
        self.redact: Callable[[str], str] | None = front.redact if front else redactor(server.log_redactor)
        self.counts = SharedCounts(memory.counts, self.api_index)
        self.turns = Turns()  # of this model's engines, as is the entrance
        self.entrance = Entrance(
            self.client,
            self.metrics,
            OpenCounts(memory.open, self.api_index),
            lambda: self.config.scheduler.max_num_queued_reqs,
        )
        self.tracing: Tracing | None = front.tracing if front else None
        self.timelines: Timelines = front.timelines if front else Timelines(server.api_server_count)
        self._threads: ThreadPoolExecutor = front._threads if front else ThreadPoolExecutor(2, "text")
        only = OfModel(self.model_names[0], self.client, self.is_ready, self.config.cache)
        self.exposition: Exposition = (
            front.exposition if front else Exposition(self.metrics, [only], self.num_open, server.metrics_prefix)
        )

    def set_text_model(self, text_model: TextModel) -> None:
        self.text_model = text_model
        self.lifecycle.text_is_loaded = True
        self.lifecycle.changed()

    def take_news(self) -> None:
        """What was changed through any API server, or by SIGHUP, counts from now on."""
        news = self.live.news()
        if news is None:
            return
        if self.front is not None:  # what is as it was at the start does not overrule the model's own
            before = self.front.started_with
            news = {name: value for name, value in news.items() if value != value_of(before, name)}
        self.config = with_values(self.started_with, news)
        log_lines.set_level(self.config.server.log_level)
        if self.models is not None:
            self.models.take_news()
            return
        scheduler = self.config.scheduler
        self.client.limit(scheduler.max_num_queued_reqs, scheduler.max_num_seqs)

    def status_changed(self, status: Status) -> None:
        """The engine's."""
        self.metrics.status_changed(status)
        self.lifecycle.changed()

    def is_ready(self) -> bool:
        return self.lifecycle.phase() == "ready"

    def num_open(self) -> Counter[str]:
        """Requests of this moment, by model."""
        if self.models is not None:
            return self.models.num_open()
        return Counter({self.model_names[0]: self.lifecycle.num_open})

    @property
    def engines(self) -> Sequence[Engine]:
        """Of all models."""
        return self.client.engines if self.models is None else self.models.engines

    @property
    def text(self) -> TextModel:
        """Raises ``ApiError`` while it is being loaded."""
        if self.text_model is None:
            raise ApiError("model_loading", "The tokenizer is still loading.")
        return self.text_model

    @property
    def facts(self) -> EngineFacts:
        """Raises ``ApiError`` while the engine is not ready."""
        facts = self.client.facts
        if facts is None:
            raise ApiError("model_loading", "The model is still loading.")
        return facts

    def names_for(self, key: Key | None) -> list[str]:
        """Of the served names those that a key may use."""
        return [name for name in self.model_names if key is None or not key.models or name in key.models]

    def check_model(self, name: str | None, key: Key | None = None) -> str:
        """The name to answer with. Raises ``ApiError`` (404) that lists the names; what a key may not use does not
        exist for it."""
        names = self.names_for(key)
        if names and not name:
            return names[0]
        if name and name in names:
            return name
        served = ", ".join(names) or "none that this key may use"
        raise ApiError(
            "model_not_found", f"The model '{(name or '')[:256]}' does not exist. Served here: {served}.", "model"
        )

    def rank(self, given: Sequence[bytes]) -> int | None:
        """The engine that the request's headers name, if they do. Raises ``ApiError`` for one that is not there."""
        if not given:
            return None
        ranks = [engine.index for engine in self.client.engines]
        text = given[0].decode("latin-1")
        if len(given) > 1 or not re.fullmatch("[0-9]{1,9}", text) or int(text) not in ranks:
            there = f"engines {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"engine {ranks[0]} only"
            raise ApiError("invalid_value", f"{RANK_HEADER} is {text[:32]!r}, here are {there}.", RANK_HEADER)
        return int(text)

    def cache_salt(self, key_name: str | None, wanted: str | None) -> bytes:
        """What two prompts must have in common to share KV. With several keys the key is part of it: else the time of
        an answer would tell one user what another has asked (ADV-52)."""
        salt = (wanted or "").encode()
        server = self.config.server
        is_by_key = server.prefix_cache_scope == "key" or (
            server.prefix_cache_scope == "auto" and (bool(server.api_key_file) or len(server.secrets) > 1)
        )
        return f"{key_name}\0".encode() + salt if is_by_key and key_name is not None else salt

    def seed(self) -> int:
        """For a request that brings none: 63 bits, from the system or in the sequence that ``--seed`` begins."""
        return secrets.randbits(63) if self._seeds is None else self._seeds.getrandbits(63)

    async def off_loop(self, size: int, work: Callable[[], T]) -> T:
        """Runs ``work`` here if ``size`` characters are few, else in a thread, so that other streams go on."""
        if size <= _INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def encode(self, text: str, add_special_tokens: bool, param: str) -> array[int]:
        """Token ids of a prompt that can fit. Raises ``ApiError`` without tokenising a text that is far too long."""
        tokenizer, limit = self.text.tokenizer, self.facts.max_model_len
        least = -(-len(text) // tokenizer.longest_token)
        if least > limit:
            raise context_length_exceeded(limit, f"at least {least}", param)
        return await self.off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens))

    def close(self) -> None:
        if self.tracing is not None:
            self.tracing.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def context_length_exceeded(limit: int, length: int | str, param: str) -> ApiError:
    message = f"This model's maximum context length is {limit} tokens. However, your prompt has {length} tokens."
    return ApiError("context_length_exceeded", f"{message} At least one more is needed for the reply.", param)
