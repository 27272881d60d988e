"""The scheduler once more, in Python and as plainly as can be: what cpp/core must decide (F-22).

Of single choices without logit adjustments; forks and those are left to tests/cpp/core_property.cpp. Lists are
searched, keys are the tokens themselves: nothing here is fast, and nothing is shared with the core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

Key = tuple[bytes, tuple[int, ...]]


class Pool:
    """Blocks with references, keys of full ones, and the free ones, the next to be reused first."""

    def __init__(self, num_blocks: int) -> None:
        self.free = list(range(num_blocks))
        self.references = [0] * num_blocks
        self.key_of: dict[int, Key] = {}
        self.block_of: dict[Key, int] = {}

    def allocate(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        for block in taken:
            self.references[block] = 1
            if block in self.key_of:
                del self.block_of[self.key_of.pop(block)]
        return taken

    def share(self, block: int) -> None:
        if self.references[block] == 0:
            self.free.remove(block)
        self.references[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free.insert(len(self.free) if block in self.key_of else 0, block)

    def publish(self, block: int, key: Key) -> None:
        if block not in self.key_of and key not in self.block_of:
            self.key_of[block], self.block_of[key] = key, block

    def forget(self) -> None:
        self.key_of.clear()
        self.block_of.clear()


@dataclass(eq=False)
class Request:
    id: int
    order: tuple[int, int]  # priority, arrival
    tokens: list[int]
    num_prompt: int
    limit: int
    min_tokens: int
    stops: frozenset[int]
    salt: bytes
    computed: int = 0
    unknown: int = 0
    under_way: int = 0
    published: int = 0
    preemptions: int = 0
    may_publish: bool = True
    is_live: bool = True
    blocks: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens) + self.unknown

    @property
    def missing(self) -> int:
        return self.length - self.computed

    @property
    def is_ready(self) -> bool:
        return self.unknown == 0 or self.length < self.limit


class Row(NamedTuple):
    """What a batch says of one sequence."""

    num_new: int
    length: int
    blocks: list[int]


class _Settled(NamedTuple):
    request: Request
    computed: int
    preemptions: int
    samples: bool


class ReferenceScheduler:
    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        max_len: int,
        depth: int,
        caches: bool,
    ) -> None:
        self.pool, self.block_size, self.caches = Pool(num_blocks), block_size, caches
        self.max_num_seqs, self.budget, self.depth = max_num_seqs, budget, depth
        self.longest = min(max_len, num_blocks * block_size)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.under_way: list[list[_Settled]] = []
        self._arrivals = 0

    def add(
        self,
        id: int,
        tokens: list[int],
        generated: int,
        priority: int,
        most: int,
        least: int,
        stops: set[int],
        salt: bytes,
    ) -> None:
        prompt = len(tokens) - generated
        limit = prompt + min(most, self.longest - prompt)
        order = (priority, self._arrivals)
        self._arrivals += 1
        self._wait(Request(id, order, list(tokens), prompt, limit, least, frozenset(stops), salt))

    def abort(self, id: int) -> bool:
        found = [request for request in self.waiting + self.running if request.id == id]
        for request in found:
            self._finish(request)
        return bool(found)

    def forget(self) -> None:
        self.pool.forget()
        under_way = [settled.request for rows in self.under_way for settled in rows]
        for request in {*self.waiting, *self.running, *under_way}:
            if request.blocks:
                request.may_publish = False

    def schedule(self) -> list[Row] | None:
        if len(self.under_way) == self.depth:
            return None
        self._left, self._plan = self.budget, list[tuple[Request, int, bool]]()
        if self._continue_running():
            self._admit_waiting()
        if not self._plan:
            return None
        rows, settled = list[Row](), list[_Settled]()
        for request, num_new, _ in sorted(self._plan, key=lambda planned: not planned[2]):
            request.computed += num_new
            request.under_way += 1
            samples = request.computed == request.length
            rows.append(Row(num_new, request.computed, request.blocks[: self._blocks_for(request.computed)]))
            request.unknown += samples
            settled.append(_Settled(request, request.computed, request.preemptions, samples))
        self.under_way.append(settled)
        return rows

    def commit(self, tokens: list[int]) -> list[tuple[int, int, int]]:
        """(id, token, reason: 0 goes on, 1 stop, 2 length) of every live request that got one."""
        picked, given = iter(tokens), list[tuple[int, int, int]]()
        for request, computed, preemptions, samples in self.under_way.pop(0):
            request.under_way -= 1
            was_live, reason = request.is_live, 0
            if samples:
                token = next(picked)
                request.unknown -= 1
                if was_live:
                    request.tokens.append(token)
                    generated = len(request.tokens) - request.num_prompt
                    stops = generated > request.min_tokens and token in request.stops
                    reason = 1 if stops else 2 if len(request.tokens) >= request.limit else 0
                    given.append((request.id, token, reason))
            if preemptions == request.preemptions:
                self._publish(request, min(computed, len(request.tokens)))
            if reason:
                self._finish(request)
            elif not was_live and request.under_way == 0:
                self._release(request)
        return given

    def _continue_running(self) -> bool:
        """False if blocks ran short."""
        for_prompts = self._left - sum(request.missing == 1 for request in self.running)
        has_room, i = True, 0
        while i < len(self.running):
            request = self.running[i]
            i += 1
            missing = request.missing
            if missing > 1 and has_room:
                num_running = len(self.running)
                for_prompts = self._admit_before(request, for_prompts)
                i += len(self.running) - num_running
            num_new = 1 if missing == 1 else min(missing, for_prompts)
            if num_new == 0 or not request.is_ready:
                continue
            while not self._grow(request, num_new):
                has_room = False
                last = self.running[-1]
                if last is request:
                    return False
                self._preempt(last)
            for_prompts -= num_new if missing > 1 else 0
            is_decode = num_new == 1 and missing == 1 and request.computed >= request.num_prompt
            self._planned(request, num_new, is_decode)
        return has_room

    def _admit_before(self, request: Request, tokens: int) -> int:
        """Those that wait and come before a running one whose prompt goes on; returns what is left of the tokens."""
        while tokens > 0 and self.waiting and self.waiting[0].order < request.order:
            before = self._left
            if not self._admit_head(tokens):
                break
            tokens -= before - self._left
        return tokens

    def _admit_waiting(self) -> None:
        while self.waiting and self._left > 0 and self._admit_head(self._left):
            pass

    def _admit_head(self, most: int) -> bool:
        head = self.waiting[0]
        if len(self.running) == self.max_num_seqs or not head.is_ready:
            return False
        found = self._prefix(head)
        revived = sum(self.pool.references[block] == 0 for block in found)
        needed = self._blocks_for(head.length) - len(found) + revived
        if needed + len(self.running) > len(self.pool.free):
            return False
        for block in found:
            self.pool.share(block)
        head.blocks, head.computed, head.published = found, len(found) * self.block_size, len(found)
        self.waiting.pop(0)
        self.running.append(head)
        self.running.sort(key=lambda request: request.order)
        num_new = min(head.missing, most)
        assert self._grow(head, num_new)
        self._planned(head, num_new, False)
        return True

    def _planned(self, request: Request, num_new: int, is_decode: bool) -> None:
        self._left -= num_new
        self._plan.append((request, num_new, is_decode))
        self._publish(request, min(request.computed + num_new, len(request.tokens)))

    def _prefix(self, request: Request) -> list[int]:
        found: list[int] = []
        for i in range((len(request.tokens) - 1) // self.block_size if self.caches else 0):
            block = self.pool.block_of.get(self._key(request, i))
            if block is None:
                break
            found.append(block)
        return found

    def _grow(self, request: Request, num_new: int) -> bool:
        missing = self._blocks_for(request.computed + num_new) - len(request.blocks)
        if missing > len(self.pool.free):
            return False
        request.blocks += self.pool.allocate(max(missing, 0))
        return True

    def _publish(self, request: Request, computed: int) -> None:
        if self.caches and request.may_publish:
            for i in range(request.published, computed // self.block_size):
                self.pool.publish(request.blocks[i], self._key(request, i))
                request.published += 1

    def _preempt(self, request: Request) -> None:
        self._release(request)
        self.running.remove(request)
        request.preemptions += 1
        self._wait(request)

    def _finish(self, request: Request) -> None:
        request.is_live = False
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        if request.under_way == 0:
            self._release(request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.computed, request.published, request.may_publish = [], 0, 0, True

    def _wait(self, request: Request) -> None:
        self.waiting.append(request)
        self.waiting.sort(key=lambda each: each.order)

    def _key(self, request: Request, i: int) -> Key:
        return request.salt, tuple(request.tokens[: (i + 1) * self.block_size])

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
