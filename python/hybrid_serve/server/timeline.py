"""Timelines: what became of each of the last requests, step by step (P10)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Literal

import msgspec

from ..client import ChoiceEvent
from .errors import ApiError
from .keys import Key

if TYPE_CHECKING:
    from .generation import Generation

KEPT = 10_000  # requests


class TimelineEvent(msgspec.Struct, omit_defaults=True):
    """``queued``, ``admitted``, ``chunk``, ``preempted``, ``first_token`` or ``finished``; of which choice, at which
    time after the request's arrival, in a step of how many tokens and sequences."""

    event: str
    ms: float
    choice: int | None = None
    tokens: int | None = None  # admitted: found in the cache; chunk: computed; preempted: to be computed again
    waited_for: str | None = None  # blocks, tokens (of a step's budget), sequences or adjustments
    batch_tokens: int | None = None
    batch_seqs: int | None = None


class Timeline(msgspec.Struct):
    """Where the time of one request went. The phases follow each other from its arrival on, without a gap."""

    id: str
    state: str  # running, or how each choice ended
    created: int
    engine: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    num_preemptions: int
    e2e_ms: float
    phases_ms: dict[str, float]
    events: list[TimelineEvent]
    object: Literal["request.timeline"] = "request.timeline"


@dataclass(slots=True)
class _Entry:
    generation: Generation | None  # while it runs
    page: bytes = b""


class Timelines:
    """The last ``KEPT`` requests of this API server, by the name of their key and their id; of those that ended only
    the finished page. Has no prompt, no text and no token."""

    def __init__(self, num_api_servers: int = 1) -> None:
        self._num_api_servers = num_api_servers
        self._entries: dict[tuple[str | None, str], _Entry] = {}  # oldest first

    def began(self, key: str | None, id: str, generation: Generation) -> None:
        self._entries.pop((key, id), None)  # a client that uses an id again means the new one
        self._entries[key, id] = _Entry(generation)
        if len(self._entries) > KEPT:
            del self._entries[next(iter(self._entries))]

    def ended(self, key: str | None, id: str, generation: Generation) -> None:
        entry = self._entries.get((key, id))
        if entry is not None and entry.generation is generation:
            entry.page, entry.generation = _page(id, generation, is_over=True), None

    def find(self, key: Key | None, id: str) -> bytes:
        """As JSON. Whoever is no admin sees the requests of the own key only. Raises ``ApiError`` (404), the same for
        one that is unknown and for one of another key."""
        entry = self._entries.get((key.name if key else None, id))
        if entry is None and key is not None and "admin" in key.scopes:
            entry = next((found for (_, its_id), found in reversed(self._entries.items()) if its_id == id), None)
        if entry is None:
            text = f"No request '{id[:128]}' of this key is among the last {KEPT}."
            if self._num_api_servers > 1:
                text += (
                    f" {self._num_api_servers} API servers share the port, and each knows its own requests only: "
                    "ask again over a new connection, it may reach the one that served it."
                )
            raise ApiError("request_not_found", text)
        return entry.page if entry.generation is None else _page(id, entry.generation, is_over=False)


def _page(id: str, generation: Generation, is_over: bool) -> bytes:
    now, usage = monotonic(), generation.usage()
    ends = ",".join(choice.finish_reason or "unfinished" for choice in generation.choices)
    events = generation.events()
    return msgspec.json.encode(
        Timeline(
            id=id,
            state=ends if is_over else "running",
            created=int(time.time() - (now - generation.arrived)),
            engine=generation.choices[0].engine,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
            completion_tokens=usage.completion_tokens,
            num_preemptions=sum(choice.num_preemptions for choice in generation.choices),
            e2e_ms=_ms(now - generation.arrived),
            phases_ms={name: _ms(seconds) for name, seconds in _phases(generation, events, now).items()},
            events=[TimelineEvent("queued", 0.0), *(_event(event, generation.arrived) for event in events)],
        )
    )


def _phases(generation: Generation, events: list[ChoiceEvent], now: float) -> dict[str, float]:
    """Those of ``Server-Timing``, and the rest: what the reply took behind its last token."""
    timing = generation.timing()
    if timing is not None:
        phases = timing.phases()
        return {**phases, "send": now - generation.arrived - sum(phases.values())}
    first = next((event.at for event in events if event.what == "admitted"), now)
    return {"queue": first - generation.arrived, "prefill": now - first}


def _event(event: ChoiceEvent, arrived: float) -> TimelineEvent:
    return TimelineEvent(
        event.what,
        _ms(max(0.0, event.at - arrived)),
        event.choice,
        event.value if event.what not in ("first_token", "finished") else None,
        event.waited_for if event.waited_for != "nothing" else None,
        event.num_tokens,
        event.num_seqs,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
