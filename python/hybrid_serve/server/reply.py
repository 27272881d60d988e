"""How an answer leaves: as events while it grows, or whole when it has ended. Knows the order, not the format."""

from __future__ import annotations

from contextlib import aclosing
from typing import Protocol

import msgspec

from .generation import Delta, Generation
from .request_log import RequestLog
from .sse import Exchange


class Answer(Protocol):
    """One endpoint's format of a generation."""

    def events(self, deltas: list[Delta]) -> bytes:
        """What one step adds to a stream; empty: nothing to say yet."""
        ...

    def last_events(self) -> bytes:
        """What ends a stream."""
        ...

    def collect(self, deltas: list[Delta]) -> None: ...
    def whole(self) -> msgspec.Struct: ...


async def reply(exchange: Exchange, generation: Generation, answer: Answer, *, stream: bool) -> None:
    """Runs the generation to its end. Leaving early, by any path, aborts what still runs."""
    exchange.timing, generation.seat = generation.server_timing, exchange.seat
    if stream:
        exchange.begin_stream()
    log = RequestLog(generation, exchange)
    turns, size = generation.context.turns, float(sum(len(prompt.token_ids) for prompt in generation.prompts))
    if exchange.key is not None:
        size /= exchange.key.weight
        generation.priority = min(max(generation.priority + exchange.key.priority, -(2**31)), 2**31 - 1)
    with turns.taken(exchange.key_name, generation.priority, size, generation.longest_wait()) as turn:
        generation.priority = turn.priority
        try:
            async with aclosing(generation.steps()) as steps:
                async for deltas in steps:
                    turn.came()
                    log.saw(deltas)
                    if not stream:
                        answer.collect(deltas)
                    elif events := answer.events(deltas):
                        await exchange.write(events)
        finally:
            log.ended()
    if stream:
        await exchange.end_stream(answer.last_events())
    else:
        await exchange.answer(msgspec.json.encode(answer.whole()))
