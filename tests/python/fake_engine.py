"""An engine client without an engine: scripted token ids, in steps that the test shapes."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from hybrid_serve.client import ChoiceEvent, ChoiceOutput, EngineDead, EngineRejected, TokenLogprobs
from hybrid_serve.wire import EngineFacts, EngineStats, FinishReason, SamplingParams, Status

FACTS = EngineFacts(49152, 256, 16, 100, "float32", "cpu")
READY = Status("ready", 1.0)


@dataclass
class Call:
    """What one ``generate`` was given, and what became of it."""

    token_ids: list[int]
    params: SamplingParams
    n: int
    priority: int
    eos_token_ids: tuple[int, ...]
    cache_salt: bytes
    rank: int | None = None
    aborted_choices: list[int] = field(default_factory=list)
    entered: bool = False
    left: bool = False
    unfinished_when_left: int = 0


class FakeStream:
    """Plays one script a choice; ends a choice as the engine would: at eos, a stop id or max_tokens."""

    def __init__(self, engine: FakeEngine, call: Call) -> None:
        self._engine, self._call = engine, call
        self._open = set(range(call.n))
        self.engine = engine.ranks[0] if call.rank is None else call.rank
        self.events = engine.events()

    async def __aenter__(self) -> FakeStream:
        self._call.entered = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.left = True
        self._call.unfinished_when_left = len(self._open)

    def __aiter__(self) -> AsyncIterator[list[ChoiceOutput]]:
        return self._steps()

    def abort(self, choice: int) -> None:
        self._call.aborted_choices.append(choice)
        self._open.discard(choice)

    async def _steps(self) -> AsyncIterator[list[ChoiceOutput]]:
        engine, call = self._engine, self._call
        if engine.reject is not None:
            raise engine.reject
        scripts = [list(engine.script(call, choice)) for choice in range(call.n)]
        position = 0
        while self._open:
            await engine.pause(position)
            if engine.reject_after is not None and position >= engine.reject_after[0]:
                raise engine.reject_after[1]
            if engine.dies_after is not None and position >= engine.dies_after:
                raise EngineDead("killed by the test")
            outputs = [
                self._output(choice, scripts[choice], position) for choice in sorted(self._open) if choice in self._open
            ]
            position += engine.tokens_per_step
            yield outputs

    def _output(self, choice: int, script: list[int], position: int) -> ChoiceOutput:
        call, params = self._call, self._call.params
        ids: list[int] = []
        finish = FinishReason.NONE
        for offset in range(position, position + self._engine.tokens_per_step):
            token = script[offset] if offset < len(script) else call.eos_token_ids[0] if call.eos_token_ids else 0
            ids.append(token)
            if (token in call.eos_token_ids or token in params.stop_token_ids) and offset >= params.min_tokens:
                finish = FinishReason.STOP
            elif offset + 1 >= params.max_tokens:
                finish = FinishReason.LENGTH
            if finish is not FinishReason.NONE:
                self._open.discard(choice)
                break
        logprobs: list[TokenLogprobs] = []
        if params.logprobs >= 0:
            tops = [[(token + i, -0.5 - i) for i in range(params.logprobs)] for token in ids]
            logprobs = [TokenLogprobs(-0.5, 1, top) for top in tops]
        cached = self._engine.cached_tokens if position == 0 else -1
        began = self._engine.prefill_seconds if position == 0 else -1.0
        return ChoiceOutput(choice, ids, finish, cached, logprobs, self._engine.num_preemptions, began)


@dataclass(frozen=True)
class FakeRank:
    index: int
    status: Status
    stats: EngineStats
    wait_seconds: float = 0.0
    stats_age: float = 0.0
    num_open: int = 0


@dataclass
class FakeEngine:
    """The ``EngineClient`` of the tests."""

    script: Callable[[Call, int], Sequence[int]]
    tokens_per_step: int = 1
    cached_tokens: int = 0
    num_preemptions: int = 0
    prefill_seconds: float = 0.0
    status: Status = READY
    facts: EngineFacts | None = FACTS
    stats: EngineStats = field(default_factory=EngineStats)
    wait_seconds: float = 0.0
    stats_age: float = 0.0
    ranks: tuple[int, ...] = (0,)
    reject: EngineRejected | None = None
    reject_after: tuple[int, EngineRejected] | None = None
    dies_after: int | None = None
    calls: list[Call] = field(default_factory=list)
    limits: list[tuple[int, int]] = field(default_factory=list)
    events: Callable[[], list[ChoiceEvent]] = list  # of each stream
    gates: dict[int, asyncio.Event] = field(default_factory=dict)  # before the step at that position

    @property
    def engines(self) -> list[FakeRank]:
        status = msgspec.structs.replace(self.status, facts=self.facts)
        num_open = sum(call.n for call in self.calls if call.entered and not call.left)  # each counts for every rank
        return [FakeRank(rank, status, self.stats, self.wait_seconds, self.stats_age, num_open) for rank in self.ranks]

    def limit(self, max_num_queued_reqs: int, max_num_seqs: int) -> None:
        self.limits.append((max_num_queued_reqs, max_num_seqs))

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
    ) -> FakeStream:
        assert params.seed is not None
        call = Call(list(array("i", token_ids)), params, n, priority, eos_token_ids, cache_salt, rank)
        self.calls.append(call)
        return FakeStream(self, call)

    async def pause(self, position: int) -> None:
        gate = self.gates.get(position)
        if gate is not None:
            await gate.wait()
        else:
            await asyncio.sleep(0)
