"""The load generator: streams requests to an OpenAI-compatible server at given times and notes when tokens come."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import msgspec

from ..http_client import HttpClient, HttpFailure


@dataclass(frozen=True)
class Prompt:
    """What one request asks: a text of ``num_tokens`` tokens, and for how many."""

    text: str
    num_tokens: int
    output_len: int


@dataclass
class Outcome:
    """How one request went; times in seconds. ``error`` is empty if it succeeded."""

    prompt: Prompt
    start: float = 0.0
    ttft: float = 0.0  # from the start to the first text
    latency: float = 0.0  # from the start to the last text
    itl: list[float] = field(default_factory=list)  # between texts
    output_tokens: int = 0  # as the server counts them; texts, where it does not
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float:
        """Mean seconds of a token after the first."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def said(self) -> str:
        if self.delta is not None:
            return self.delta.content or self.delta.reasoning_content or ""
        return self.text or ""


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event)


@dataclass(frozen=True)
class Target:
    """Which route of which server, and the fields that all requests share. ``fields`` win over our own."""

    client: HttpClient
    path: str
    model: str
    is_chat: bool
    fields: dict[str, Any]

    def body(self, prompt: Prompt) -> bytes:
        said = {"messages": [{"role": "user", "content": prompt.text}]} if self.is_chat else {"prompt": prompt.text}
        shared = {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(
            {"model": self.model, **said, "max_tokens": prompt.output_len, **shared, **self.fields}
        ).encode()


async def send(target: Target, prompt: Prompt) -> Outcome:
    """One request from its first byte to its last. Never raises for what the server does."""
    outcome = Outcome(prompt, perf_counter())
    body = target.body(prompt)
    try:
        async with target.client.request("POST", target.path, body) as answer:
            if answer.status != 200:
                text = (await answer.read()).decode(errors="replace")
                outcome.error = f"HTTP {answer.status}: {text[:300]}"
                return outcome
            rest = b""
            async for piece in answer:
                now = perf_counter()
                *events, rest = (rest + piece).split(b"\n\n")
                for event in events:
                    _take(outcome, event, now)
    except (HttpFailure, msgspec.DecodeError) as error:
        outcome.error = str(error)
    if not outcome.error and not outcome.latency:
        outcome.error = "the reply has no text"
    return outcome


def _take(outcome: Outcome, event: bytes, now: float) -> None:
    data = event.partition(b"data:")[2].strip() if event.startswith(b"data:") else b""
    if not data or data == b"[DONE]":
        return
    decoded = _event.decode(data)
    if decoded.error is not None:
        outcome.error = json.dumps(decoded.error)[:300]
    if said := "".join(choice.said for choice in decoded.choices):
        since = now - outcome.start
        if outcome.latency:
            outcome.itl.append(since - outcome.latency)
        else:
            outcome.ttft = since
        outcome.latency = since
        outcome.text += said
        if decoded.usage is None:
            outcome.output_tokens += 1
    if decoded.usage is not None and decoded.usage.completion_tokens:
        outcome.output_tokens = decoded.usage.completion_tokens


@dataclass(frozen=True)
class Ramp:
    """Requests a second that grow (or shrink) from the first request to the last."""

    start: float
    end: float
    is_exponential: bool

    def rates(self, count: int) -> list[float]:
        shares = [i / max(1, count - 1) for i in range(count)]
        if self.is_exponential:
            return [self.start * (self.end / self.start) ** share for share in shares]
        return [self.start + (self.end - self.start) * share for share in shares]


def arrivals(count: int, rate: float | Ramp, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each request is sent: gamma-distributed gaps (``burstiness`` 1: Poisson),
    stretched so that the mean rate is exactly ``rate``; all at 0 if it is infinite."""
    rates = rate.rates(count) if isinstance(rate, Ramp) else [rate] * count
    if math.isinf(rates[0]):
        return [0.0] * count
    chooser = random.Random(seed)
    gaps = [chooser.gammavariate(burstiness, 1.0 / (each * burstiness)) for each in rates]
    stretch = sum(1.0 / each for each in rates) / sum(gaps)
    times, now = [], 0.0
    for gap in gaps:
        times.append(now)
        now += gap * stretch
    return times


async def run(
    target: Target,
    prompts: Sequence[Prompt],
    times: Sequence[float],
    max_concurrency: int | None,
    on_done: Callable[[Outcome], None],
) -> tuple[list[Outcome], float]:
    """Every prompt's outcome, in order, and the seconds from the first request's start to the last one's end."""
    gate = asyncio.Semaphore(max_concurrency or len(prompts))
    began = perf_counter()

    async def one(prompt: Prompt, at: float) -> Outcome:
        if (wait := began + at - perf_counter()) > 0:
            await asyncio.sleep(wait)
        async with gate:
            outcome = await send(target, prompt)
        on_done(outcome)
        return outcome

    outcomes = await asyncio.gather(*(one(prompt, at) for prompt, at in zip(prompts, times, strict=True)))
    return outcomes, perf_counter() - began
