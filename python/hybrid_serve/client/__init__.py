"""The API server's side of the engine: streams of token ids; knows frames and ids, not text, not HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ..wire import EngineFacts, EngineStats, FinishReason, SamplingParams, Status


class TokenLogprobs(NamedTuple):
    """Raw log-probabilities of one picked token and of the most likely ones, most likely first."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]  # (token id, log-probability)


@dataclass(slots=True)
class ChoiceOutput:
    """What one step gave one choice of a request."""

    choice: int
    token_ids: list[int]
    finish: FinishReason = FinishReason.NONE
    cached_tokens: int = -1  # prompt tokens found in the cache; only with a choice's first output
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token id, or empty
    num_preemptions: int = 0  # of the choice so far
    prefill_seconds: float = -1.0  # since the choice first ran; only with its first output


class ChoiceEvent(NamedTuple):
    """What a step did to one choice; a timeline is made of them."""

    choice: int
    at: float  # of this process's monotonic clock
    what: str  # wire.StepEvent; or first_token, finished
    value: int = 0  # tokens, see wire.StepEvent
    waited_for: str = "nothing"  # wire.WaitedFor
    num_tokens: int = 0  # of the step's batch
    num_seqs: int = 0


class EngineRejected(Exception):
    """The engine refused the request: the client's fault (4xx) or the moment's (503)."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


class EngineDead(Exception):
    """The engine process went away; becomes a 503 or an error event on a stream."""


class Stream(Protocol):
    """The outputs of one request. Iterating ends when every choice has finished. Raises EngineRejected or EngineDead.

    Use ``async with client.generate(...) as stream``: leaving the block by any path aborts what still runs.
    """

    @property
    def engine(self) -> int:
        """The index of the engine that has it; known from the entering of the block on, another one after a death."""
        ...

    @property
    def events(self) -> Sequence[ChoiceEvent]:
        """What steps did to it, in order; of a request that is thrown out again and again, the first ones."""
        ...

    async def __aenter__(self) -> Stream: ...
    async def __aexit__(self, *_: object) -> None: ...
    def __aiter__(self) -> AsyncIterator[list[ChoiceOutput]]:
        """All outputs that arrived since the last turn, in order; never an empty list."""
        ...

    def abort(self, choice: int) -> None:
        """Ends one choice (its stop string was found). It gives no further output and counts as finished."""
        ...


class Engine(Protocol):
    """What is known of one engine."""

    @property
    def index(self) -> int:
        """Its rank among all engines of the deployment, hence not always from 0 on."""
        ...

    @property
    def status(self) -> Status: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def stats_age(self) -> float:
        """Seconds since it said so."""
        ...

    @property
    def num_open(self) -> int:
        """Choices that run or wait, of all API servers, at this moment."""
        ...

    @property
    def wait_seconds(self) -> float:
        """Until a new request would be let in, as far as one can tell; 0: at once, or one cannot."""
        ...


class EngineClient(Protocol):
    """One API server's view of the engine(s)."""

    @property
    def engines(self) -> Sequence[Engine]: ...

    @property
    def status(self) -> Status:
        """The phase of all engines together, with progress while one loads."""
        ...

    @property
    def facts(self) -> EngineFacts | None:
        """What every one of them can do; None until each has been ready."""
        ...

    def limit(self, max_num_queued_reqs: int, max_num_seqs: int) -> None:
        """How many requests may wait (0: any number) and run (0: as many as there is room for) in each engine from now
        on."""
        ...

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
    ) -> Stream:
        """``token_ids``: i32, little-endian. ``params.seed`` must be set. ``rank``: the index of the engine that shall
        have it, one of ``engines``; None: whichever has least to do."""
        ...
