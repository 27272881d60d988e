"""One request's run: its prompts given to the engine, its choices followed until they end."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic

from ..client import ChoiceEvent, ChoiceOutput, EngineDead, EngineRejected, Stream, TokenLogprobs
from ..text.detokenizer import Detokenizer
from ..wire import FinishReason, SamplingParams
from .answers import FinishName, PromptTokensDetails, Usage
from .context import ServerContext
from .entrance import Seat
from .errors import ApiError
from .patience import ENDLESS, Patience, Progress, bounded

_MAX_PROMPTS_AT_ONCE = 64  # of one request in the engine; the others wait here


@dataclass(slots=True)
class Prompt:
    token_ids: array[int]
    text: str | None = None  # as the client wrote it


class Choice:
    """One reply while it grows; knows its text, not its format."""

    __slots__ = (
        "cached_tokens",
        "detokenizer",
        "engine",
        "finish_reason",
        "first_time",
        "index",
        "last_time",
        "num_preemptions",
        "prefill_seconds",
        "prompt",
    )

    def __init__(self, index: int, prompt: Prompt, detokenizer: Detokenizer, engine: int) -> None:
        self.index = index
        self.engine = engine  # the last one that worked on it
        self.prompt = prompt
        self.detokenizer = detokenizer
        self.finish_reason: FinishName | None = None
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.prefill_seconds = 0.0  # from its first step to its first token
        self.first_time = self.last_time = 0.0  # of the first and of the last output; 0: none yet

    @property
    def stop_reason(self) -> str | int | None:
        return self.detokenizer.stop_reason

    @property
    def num_tokens(self) -> int:
        return self.detokenizer.num_tokens


@dataclass(slots=True)
class Delta:
    """What one step added to one choice."""

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]


@dataclass
class Generation:
    """All choices of one request: choice ``p * n + j`` is the j-th of prompt p. Use ``async with aclosing(g.steps())``.

    Leaving ``steps`` by any path aborts what still runs in the engine.
    """

    context: ServerContext
    prompts: list[Prompt]
    params: SamplingParams
    n: int = 1
    priority: int = 0
    cache_salt: bytes = b""
    rank: int | None = None  # the engine that shall have it
    arrived: float = field(default_factory=monotonic)
    patience: Patience = ENDLESS
    seat: Seat = field(default_factory=Seat)

    def __post_init__(self) -> None:
        tokenizer = self.context.text.tokenizer
        self.eos_token_ids = tokenizer.special.eos_token_ids
        self._streams: list[tuple[int, Stream]] = []  # with their first choice
        first = self.context.client.engines[0].index  # a request that reaches none counts as the first one's
        self.choices = [
            Choice(i, self.prompts[i // self.n], Detokenizer(tokenizer, self.params, self.eos_token_ids), first)
            for i in range(len(self.prompts) * self.n)
        ]

    async def steps(self) -> AsyncGenerator[list[Delta], None]:
        """What each step gave, in order. Raises ``EngineRejected`` or ``EngineDead``."""
        metrics = self.context.metrics
        unfinished = "abort"
        try:
            self.patience.refuse_hopeless(monotonic() - self.arrived, self._wait_seconds())
            source = self._one(0) if len(self.prompts) == 1 else self._many()
            if self.patience != ENDLESS:
                source = bounded(source, self.patience, self.arrived, self._progress, self._wait_seconds)
            async with aclosing(source):
                async for first, stream, outputs in source:
                    yield self._deltas(first, stream, outputs)
            if any(choice.finish_reason is None for choice in self.choices):
                raise EngineDead("the stream ended before its choices")
        except (EngineRejected, EngineDead) as error:
            unfinished = "error"
            is_refused = isinstance(error, EngineRejected) and error.code == "overloaded"
            metrics.of(self.choices[0].engine).admission_rejections += is_refused
            raise
        except ApiError:
            unfinished = "error"
            metrics.of(self.choices[0].engine).num_late += 1
            raise
        finally:
            metrics.ended(self.arrived, self.choices, self.n, unfinished)

    def _wait_seconds(self) -> float:
        """Until an engine that may have the request has a place for it."""
        engines = self.context.client.engines
        waits = [engine.wait_seconds for engine in engines if self.rank in (None, engine.index)]
        return min(waits, default=0.0)

    def longest_wait(self) -> float:
        """Seconds that a request has waited for a place in an engine; 0: none waits."""
        engines = self.context.client.engines
        waits = [each.stats.waiting_seconds + each.stats_age for each in engines if each.stats.num_waiting]
        return max(waits, default=0.0)

    def _progress(self) -> Progress:
        if any(choice.first_time for choice in self.choices):
            return Progress.BEGUN
        is_admitted = any(event.what == "admitted" for _, stream in self._streams for event in stream.events)
        return Progress.ADMITTED if is_admitted else Progress.WAITING

    def _deltas(self, first: int, stream: Stream, outputs: list[ChoiceOutput]) -> list[Delta]:
        now = monotonic()
        counts = self.context.metrics.of(stream.engine)
        deltas: list[Delta] = []
        for output in outputs:
            choice = self.choices[first + output.choice]
            if choice.finish_reason is not None:
                continue  # sent before the engine knew of our abort
            choice.engine = stream.engine
            detokenizer = choice.detokenizer
            before = detokenizer.num_tokens
            text = detokenizer.feed(output.token_ids, output.finish)
            taken = detokenizer.num_tokens - before
            ids, logprobs = output.token_ids, output.logprobs
            if detokenizer.stopped:
                choice.finish_reason = "stop"
                if output.finish is FinishReason.NONE:
                    stream.abort(output.choice)
                ids, logprobs = ids[:taken], logprobs[:taken]
            elif output.finish is not FinishReason.NONE:
                choice.finish_reason = _finish_name(output.finish)
            if choice.first_time:
                counts.next_tokens(now - choice.last_time, taken)
            else:
                choice.cached_tokens = max(0, output.cached_tokens)
                choice.prefill_seconds = min(max(0.0, output.prefill_seconds), now - self.arrived)
                choice.first_time = now
                counts.first_tokens(now - self.arrived, taken)
            choice.last_time = now
            choice.num_preemptions = max(choice.num_preemptions, output.num_preemptions)  # a replay begins at 0
            deltas.append(Delta(choice, text, ids, logprobs))
        return deltas

    async def _one(self, prompt_index: int) -> AsyncGenerator[tuple[int, Stream, list[ChoiceOutput]], None]:
        first = prompt_index * self.n
        opened = self.context.client.generate(
            self.prompts[prompt_index].token_ids.tobytes(),
            self.params,
            n=self.n,
            priority=self.priority,
            eos_token_ids=() if self.params.ignore_eos else self.eos_token_ids,
            cache_salt=self.cache_salt,
            rank=self.rank,
        )
        async with opened as stream:
            self._streams.append((first, stream))
            self._begun(prompt_index, stream)
            async for outputs in stream:
                yield first, stream, outputs

    def _begun(self, prompt_index: int, stream: Stream) -> None:
        """An engine has been asked for the choices of that prompt."""
        counts = self.context.metrics.of(stream.engine)
        if prompt_index == 0:
            self.seat.leave()
            counts.started(self.params, self.n)
        counts.prompt(len(self.prompts[prompt_index].token_ids))
        for choice in self.choices[prompt_index * self.n : (prompt_index + 1) * self.n]:
            choice.engine = stream.engine

    async def _many(self) -> AsyncGenerator[tuple[int, Stream, list[ChoiceOutput]], None]:
        """Several prompts, merged as their outputs come."""
        merged: asyncio.Queue[tuple[int, Stream, list[ChoiceOutput]] | BaseException | None] = asyncio.Queue(1024)
        waiting = iter(range(len(self.prompts)))

        async def follow() -> None:
            try:
                for index in waiting:
                    async with aclosing(self._one(index)) as source:
                        async for item in source:
                            await merged.put(item)
                await merged.put(None)
            except Exception as error:
                await merged.put(error)

        followers = [asyncio.ensure_future(follow()) for _ in range(min(_MAX_PROMPTS_AT_ONCE, len(self.prompts)))]
        running = len(followers)
        try:
            while running:
                item = await merged.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for follower in followers:
                follower.cancel()
            await asyncio.gather(*followers, return_exceptions=True)

    def _cached_tokens(self) -> int:
        # The choices of one prompt share its blocks: it was looked up once.
        return sum(choice.cached_tokens for choice in self.choices[:: self.n])

    def events(self) -> list[ChoiceEvent]:
        """What the engine's steps did to it so far, in order."""
        found = [
            event._replace(choice=first + event.choice) for first, stream in self._streams for event in stream.events
        ]
        return sorted(found, key=lambda event: event.at)

    def server_timing(self) -> str | None:
        """The header of that name, P10."""
        timing = self.timing()
        return timing.header() if timing else None

    def timing(self) -> Timing | None:
        """So far; None before the first token."""
        begun = [choice for choice in self.choices if choice.first_time]
        if not begun:
            return None
        first = min(begun, key=lambda choice: choice.first_time)
        last_time = max(choice.last_time for choice in begun)
        waited = first.first_time - self.arrived - first.prefill_seconds
        num_preemptions = sum(choice.num_preemptions for choice in begun)
        return Timing(waited, first.prefill_seconds, last_time - first.first_time, num_preemptions)

    def usage(self) -> Usage:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(self._cached_tokens()),
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went, in seconds. The phases follow each other, without a gap, from its arrival on."""

    queue: float  # until the engine's first step for it
    prefill: float  # until its first token
    decode: float  # until its last one
    num_preemptions: int

    def phases(self) -> dict[str, float]:
        return {"queue": self.queue, "prefill": self.prefill, "decode": self.decode}

    def header(self) -> str:
        """As ``Server-Timing`` says it: milliseconds."""
        listed = [f"{name};dur={seconds * 1e3:.3f}" for name, seconds in self.phases().items()]
        return ", ".join([*listed, f"preempt;desc={self.num_preemptions}"])


def _finish_name(finish: FinishReason) -> FinishName:
    if finish is FinishReason.ABORT:
        raise EngineDead("the engine gave the request up")
    return "stop" if finish is FinishReason.STOP else "length"
