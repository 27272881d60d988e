"""One request's run: its prompts given to the engine, its choices followed until they end."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic

from ..client import ChoiceOutput, EngineDead, EngineRejected, Stream, TokenLogprobs
from ..text.detokenizer import Detokenizer
from ..wire import FinishReason, SamplingParams
from .answers import FinishName, PromptTokensDetails, Usage
from .context import ServerContext

_MAX_PROMPTS_AT_ONCE = 64  # of one request in the engine; the others wait here


@dataclass(slots=True)
class Prompt:
    token_ids: array[int]
    text: str | None = None  # as the client wrote it


class Choice:
    """One reply while it grows; knows its text, not its format."""

    __slots__ = ("cached_tokens", "detokenizer", "finish_reason", "index", "last_time", "prompt")

    def __init__(self, index: int, prompt: Prompt, detokenizer: Detokenizer) -> None:
        self.index = index
        self.prompt = prompt
        self.detokenizer = detokenizer
        self.finish_reason: FinishName | None = None
        self.cached_tokens = 0
        self.last_time = 0.0  # of the last output; 0: none yet

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
    arrived: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        tokenizer = self.context.text.tokenizer
        self.eos_token_ids = tokenizer.special.eos_token_ids
        self.choices = [
            Choice(i, self.prompts[i // self.n], Detokenizer(tokenizer, self.params, self.eos_token_ids))
            for i in range(len(self.prompts) * self.n)
        ]

    async def steps(self) -> AsyncGenerator[list[Delta], None]:
        """What each step gave, in order. Raises ``EngineRejected`` or ``EngineDead``."""
        metrics = self.context.metrics
        metrics.started(self.params, self.n, [len(prompt.token_ids) for prompt in self.prompts])
        unfinished = "abort"
        try:
            source = self._one(0) if len(self.prompts) == 1 else self._many()
            async with aclosing(source):
                async for first, stream, outputs in source:
                    yield self._deltas(first, stream, outputs)
            if any(choice.finish_reason is None for choice in self.choices):
                raise EngineDead("the stream ended before its choices")
        except (EngineRejected, EngineDead):
            unfinished = "error"
            raise
        finally:
            metrics.ended(self.arrived, self.choices, self._cached_tokens(), unfinished)

    def _deltas(self, first: int, stream: Stream, outputs: list[ChoiceOutput]) -> list[Delta]:
        now = monotonic()
        metrics = self.context.metrics
        deltas: list[Delta] = []
        for output in outputs:
            choice = self.choices[first + output.choice]
            if choice.finish_reason is not None:
                continue  # sent before the engine knew of our abort
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
            if choice.last_time:
                metrics.next_tokens(now - choice.last_time, taken)
            else:
                choice.cached_tokens = max(0, output.cached_tokens)
                metrics.first_tokens(now - self.arrived, taken)
            choice.last_time = now
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
        )
        async with opened as stream:
            async for outputs in stream:
                yield first, stream, outputs

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

    def usage(self) -> Usage:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(self._cached_tokens()),
        )


def _finish_name(finish: FinishReason) -> FinishName:
    if finish is FinishReason.ABORT:
        raise EngineDead("the engine gave the request up")
    return "stop" if finish is FinishReason.STOP else "length"
