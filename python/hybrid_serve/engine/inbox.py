"""Inbox: what API servers and the supervisor send the engine."""

from __future__ import annotations

import logging
import time
from array import array
from typing import TYPE_CHECKING

import msgspec
import zmq

from ..heartbeat import EnginePhase, Heartbeat
from ..session import NotNext, Stamp
from ..sockets import readable
from ..wire import API_INDEX_SHIFT, AddRequest, Join, Kind, Limit, Reject, pack, unpack
from .peers import Peers
from .probation import Probation, Suspect

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .._core import Scheduler

log = logging.getLogger(__name__)
IDLE_MS = 1000  # an engine that sleeps says so this often
MESSAGES_A_STEP = 256  # then the running requests get their step, whoever floods the socket


class BadMessage(Exception):
    """Not a message of an API server that this engine knows; dropped and counted."""


class Inbox:
    """Checks messages and turns them into calls of the scheduler; every refused request is answered. Knows no step."""

    def __init__(
        self,
        peers: Peers,
        control: zmq.Socket[bytes],
        heartbeat: Heartbeat,
        probation: Probation,
        *,
        longest_prompt: int,
        max_num_seqs: int,
        max_num_queued_reqs: int,
        poller: zmq.Poller | None = None,
    ) -> None:
        self.peers, self.control = peers, control
        self._heartbeat, self._probation = heartbeat, probation
        self.stopping = False
        self.num_dropped = 0
        self._ending: set[int] = set()  # choices that have ended, while a step under way may still have them
        self._longest_prompt = longest_prompt
        self._most_running = max_num_seqs  # there is no room for more
        self._limit_open(max_num_queued_reqs, max_num_seqs)
        self._poller = poller or zmq.Poller()
        self._poller.register(peers.socket, zmq.POLLIN)
        self._poller.register(control, zmq.POLLIN)

    def _limit_open(self, waiting: int, running: int) -> None:
        self.may_run = running
        # Counted together with the running ones: between two steps it is not known yet which of the new ones will wait.
        self._max_open = running + waiting if waiting else 0

    def wake_by(self, socket: zmq.Socket[bytes]) -> None:
        """A wait ends when this socket can be read, too."""
        self._poller.register(socket, zmq.POLLIN)

    def drain(self, core: Scheduler, wait: bool) -> None:
        """Takes in what has arrived; ``wait``: sleeps until something does, or a while."""
        if wait and not self._probation.has_next:
            self._heartbeat.enter(EnginePhase.IDLE)
            self._poller.poll(IDLE_MS)
        self._heartbeat.enter(EnginePhase.STEP)
        while readable(self.control):
            self._take_control(self.control.recv_multipart())
        for _ in range(MESSAGES_A_STEP):
            if self._is_ending(core) or not readable(self.peers.socket):
                break
            frames = self.peers.socket.recv_multipart()
            try:
                self._take(core, frames)
            except (BadMessage, NotNext, msgspec.DecodeError) as error:
                self._drop(frames, error)
        self._abort_lost(core)
        while self._probation.has_next:
            self._admit(core, self._probation.next())

    def _take_control(self, frames: list[bytes]) -> None:
        if frames[0] == Kind.SHUTDOWN:
            self.stopping = True
        else:
            self._drop(frames, BadMessage(f"kind {frames[0]!r} from the supervisor"))

    def _take(self, core: Scheduler, frames: list[bytes]) -> None:
        if len(frames) < 3:
            raise BadMessage(f"{len(frames)} frames")
        identity, first, *rest = frames
        stamp, (header, *arrays) = Stamp.of(first), rest
        kind = stamp.kind
        if kind == Kind.JOIN:
            index = unpack(header, Join).api_index
            if arrays or not self.peers.join(identity, index, stamp, rest):
                raise BadMessage(f"JOIN as API server {index}")
            self._abort_lost(core)  # of the one before; at once, lest the new one's requests are taken for them
            in_flight = memoryview(core.ids_in_flight()).cast("Q")
            self._ending.update(id for id in in_flight if id >> API_INDEX_SHIFT == index)
            return
        client = self.peers.take(identity, stamp, rest)
        if kind == Kind.CHECK:
            self.peers.num_checks += 1  # the next statistics answer
            return
        if kind == Kind.LIMIT:
            limit = unpack(header, Limit)
            if min(limit.max_num_queued_reqs, limit.max_num_seqs) < 0:
                raise BadMessage(f"a limit of {limit.max_num_queued_reqs} and {limit.max_num_seqs} requests")
            running = min(limit.max_num_seqs or self._most_running, self._most_running)
            core.limit_running(running)
            self._limit_open(limit.max_num_queued_reqs, running)
            return
        if len(arrays) != 1:
            raise BadMessage(f"{len(arrays)} arrays instead of one")
        if kind == Kind.ADD:
            self._add(core, client, unpack(header, AddRequest), arrays[0])
        elif kind == Kind.ABORT:
            self._abort(core, client, arrays[0])
        else:
            raise BadMessage(f"unknown kind {kind!r}")

    def _add(self, core: Scheduler, client: int, request: AddRequest, tokens: bytes) -> None:
        last = request.id + request.n - 1
        if request.n < 1 or request.id >> API_INDEX_SHIFT != client or last >> API_INDEX_SHIFT != client:
            raise BadMessage(f"choices {request.id:#x} to {last:#x} are not those of API server {client}")
        if len(tokens) % 4:
            raise BadMessage(f"{len(tokens)} bytes are not token ids")
        reject = None if request.is_replay else self._full(core, request)
        if reject is not None:
            self.peers.send(client, pack(Kind.REJECT, reject))
            return
        new = Suspect(client, request, tokens)
        if request.is_suspect:
            self.peers.live[client].update(new.ids)
            self._probation.hold(new)
        else:
            self._admit(core, new)

    def _admit(self, core: Scheduler, new: Suspect) -> None:
        client, request, tokens = new
        try:
            add(core, client, request, tokens)
        except (ValueError, TypeError) as error:  # TypeError: a number that no C++ integer holds
            self.peers.send(client, pack(Kind.REJECT, self._refusal(request, len(tokens) // 4, error)))
            if request.is_suspect:
                self.peers.live[client].difference_update(new.ids)
                self._probation.ended(new.ids)
            return
        self.peers.live[client].update(new.ids)

    def _full(self, core: Scheduler, request: AddRequest) -> Reject | None:
        if not self._max_open:
            return None
        num_open = core.num_open + self._probation.num_held
        if num_open + request.n <= self._max_open:
            return None
        text = f"The engine is full: {num_open} requests run or wait, {self._max_open} may. Try again later."
        return Reject(request.id, request.n, 503, text, "overloaded")

    def _refusal(self, request: AddRequest, num_prompt: int, error: Exception) -> Reject:
        if isinstance(error, TypeError):
            log.info("request %#x refused: %s", request.id, error)
            return Reject(request.id, request.n, 400, "A number in the request is out of range.", "invalid_value")
        code = "context_length_exceeded" if num_prompt > self._longest_prompt else "invalid_value"
        return Reject(request.id, request.n, 400, str(error), code)

    def _abort(self, core: Scheduler, client: int, ids: bytes) -> None:
        if len(ids) % 8:
            raise BadMessage(f"{len(ids)} bytes are not request ids")
        numbers = memoryview(ids).cast("Q").tolist()
        if any(number >> API_INDEX_SHIFT != client for number in numbers):
            raise BadMessage(f"ABORT by API server {client} of a request of another")
        core.abort(memoryview(ids).cast("Q"))
        self.peers.live[client].difference_update(numbers)
        self._probation.ended(numbers)

    def _abort_lost(self, core: Scheduler) -> None:
        if lost := self.peers.take_lost():
            core.abort(array("Q", lost))
            self._probation.ended(lost)

    def _is_ending(self, core: Scheduler) -> bool:
        """A step under way still has what an API server that joined again may ask for once more, by the same ids."""
        if self._ending:
            self._ending.intersection_update(memoryview(core.ids_in_flight()).cast("Q"))
        return bool(self._ending)

    def _drop(self, frames: list[bytes], error: Exception) -> None:
        self.num_dropped += 1
        if self.num_dropped & (self.num_dropped - 1) == 0:  # 1, 2, 4, 8 ...: a flood must not flood the log
            sizes = [len(frame) for frame in frames[:8]]
            log.warning("message %d dropped (frames of %s bytes): %s", self.num_dropped, sizes, error)


def add(core: Scheduler, client: int, request: AddRequest, tokens: Buffer) -> None:
    """Queues the request; ``tokens``: bytes of i32. Raises what ``Scheduler.add`` does; ValueError without a seed."""
    params = request.params
    if params.seed is None:
        raise ValueError("seed is missing: whoever sends the request draws one, so that a replay is exact")
    core.add(
        request.id,
        memoryview(tokens).cast("B").cast("i"),
        num_generated=request.num_generated,
        first_choice=request.first_choice,
        client=client,
        n=request.n,
        priority=request.priority,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=params.stop_token_ids if params.ignore_eos else params.stop_token_ids + request.eos_token_ids,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=params.seed,
        num_logprobs=params.logprobs,
        logit_bias=list(params.logit_bias.items()),
        allowed_token_ids=params.allowed_token_ids,
        banned_token_ids=params.banned_token_ids,
        cache_salt=request.cache_salt,
        now=time.monotonic_ns() // 1000,
    )
