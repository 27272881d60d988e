"""EngineGroup: the engines that serve one model, as one API server sees them."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any

import msgspec

from ..session import Gap, NotNext, Session, Stamp, later_id
from ..wire import (
    ALL_ENGINES,
    MAX_FRAME_BYTES,
    AddRequest,
    Empty,
    EngineFacts,
    EngineStats,
    Join,
    Kind,
    Limit,
    Reject,
    Reset,
    Status,
    StepHeader,
    pack,
    unpack,
)
from . import EngineDead, EngineRejected
from .dealers import Dealers
from .link import Link
from .open_counts import OpenCounts
from .router import Router
from .steps import event_in_step, events_of_step, outputs_of_step
from .streams import ZmqStream

log = logging.getLogger(__name__)
_QUARANTINED = "The engine died twice while it worked on this request; it is not tried again."
CHECK_SECONDS = 2.0  # between two questions to an engine that works for us; an answer costs it 100 us
MOST_RESETS = 10  # in a row, of a request of which nothing came meanwhile
_NOWHERE = ("away", "unloaded", "failed")  # phases of an engine at whose address nobody listens
_GONE = ("dead", *_NOWHERE)  # of one that does not come back by itself


class EngineGroup:
    """Gives each request to one of its engines and hands what comes back to the request's stream. When an engine is
    lost, the others are asked for the rest of what it had; where there is no other, the one that takes its place.

    Knows streams and frames; not how engines come and go, which it is told by ``take_status``. ``on_replay(engine,
    replayed, given up)``: how many requests went either way when that engine was lost.
    """

    def __init__(
        self,
        api_index: int,
        open_counts: OpenCounts,
        addresses: Sequence[tuple[int, str]],
        dealers: Dealers,
        router: Router,
    ) -> None:
        """``addresses``: (index, address) of each engine."""
        self._api_index, self._dealers, self._router = api_index, dealers, router
        self.on_replay: Callable[[int, int, int], None] | None = None
        self.links = [Link(index, address, open_counts) for index, address in addresses]
        self._by_index = {link.index: link for link in self.links}
        self._link_of: dict[ZmqStream, Link] = {}
        self._limit: Limit | None = None  # where it was changed
        self.num_replayed = self.num_quarantined = 0
        self.status = self.links[0].status  # of all together, as ``facts``
        self.facts: EngineFacts | None = None

    def start(self) -> None:
        for link in self.links:
            self._connect(link)
        self._dealers.every(CHECK_SECONDS, self._check)

    def limit(self, limit: Limit) -> None:
        self._limit = limit
        for link in self.links:
            self._send_limit(link)

    # Requests

    def begin(self, stream: ZmqStream, rank: int | None = None) -> None:
        """``rank``: the engine that shall have it."""
        stream.engine = self.links[0].index if rank is None else rank
        request, token_ids = stream.first_message()
        if len(token_ids) > MAX_FRAME_BYTES:  # the engine would hang up on the whole API server
            text = f"The prompt has {len(token_ids) // 4} tokens; no model here takes as many."
            stream.fail(EngineRejected(400, text, "context_length_exceeded"))
        elif rank is None:
            self._ask(stream, [(request, token_ids)])
        elif self._by_index[rank].is_ready:
            self._send_requests(self._by_index[rank], stream, [(request, token_ids)])
        else:
            text = f"Engine {rank}, which the request names, is {self._by_index[rank].status.phase.replace('_', ' ')}."
            stream.fail(EngineRejected(503, text, "engine_restarting"))

    def abort(self, stream: ZmqStream, ids: list[int]) -> None:
        link = self._link_of.get(stream)
        if link is None:
            return
        link.remove(stream, ids)
        self._forget_if_over(stream)
        self._send(link, pack(Kind.ABORT, Empty(), array("Q", ids)))

    def fail_all(self, error: Exception) -> None:
        for link in self.links:
            link.take_all()
        streams = list(self._link_of)
        self._link_of.clear()
        for stream in streams:
            stream.fail(error)

    def _ask(self, stream: ZmqStream, requests: Iterable[tuple[AddRequest, bytes]], lost: Link | None = None) -> None:
        """Sends them to the engine that the router picks: one that is ready, else one that will be; another one than
        ``lost`` if there is."""
        ready = [link for link in self.links if link.is_ready]
        links = [link for link in ready if link is not lost] or ready
        links = links or [link for link in self.links if link.status.phase not in _GONE]
        if not links:
            self._give_up(stream, EngineDead(self.status.message or "no engine is left"))
            return
        request, prompt = stream.first_message()
        index = links[0].index
        if len(self.links) > 1:
            index = self._router.pick({link.index: link.load for link in links}, prompt, request.cache_salt)
        self._send_requests(self._by_index[index], stream, requests)

    def _send_requests(self, link: Link, stream: ZmqStream, requests: Iterable[tuple[AddRequest, bytes]]) -> None:
        self._link_of[stream] = link
        stream.engine = link.index
        for request, token_ids in requests:
            link.add(stream, range(request.id, request.id + request.n), len(token_ids) // 4)
            self._send(link, pack(Kind.ADD, request, token_ids))

    def _give_up(self, stream: ZmqStream, error: Exception) -> None:
        self._link_of.pop(stream, None)
        stream.fail(error)

    def _forget_if_over(self, stream: ZmqStream) -> None:
        if not stream.live_ids:
            self._link_of.pop(stream, None)

    # Engines

    def take_status(self, status: Status) -> None:
        """What the supervisor says of one of them, or of all."""
        links = self.links if status.engine == ALL_ENGINES else [self._by_index[status.engine]]
        lost = []
        for link in links:
            before, facts = link.status, status.facts or link.status.facts
            link.status = msgspec.structs.replace(status, engine=link.index, facts=facts)
            if status.engine == ALL_ENGINES:
                link.status = msgspec.structs.replace(link.status, restarts=before.restarts)
            is_gone = status.phase in _GONE and before.phase not in _GONE
            is_elsewhere = bool(status.address) and (status.address != link.address or link.socket is None)
            if is_elsewhere:
                link.address = status.address
            if link.status.restarts != before.restarts or is_gone or is_elsewhere:
                lost.append(link)
        self._sum_up()
        for link in lost:
            self._replay(link, status.suspects, status.culprits)

    def _sum_up(self) -> None:
        """The phase of all together is ready when one is and every one has been: a server that has begun to serve goes
        on with what it has. What they can do together is what the smallest of them can."""
        facts = [link.status.facts for link in self.links]
        known = [each for each in facts if each is not None]
        self.facts = None
        if len(known) == len(facts):
            self.facts = min(known, key=lambda each: each.max_model_len)
        ready = [link.status for link in self.links if link.is_ready]
        if ready and self.facts is not None:
            self.status = ready[0]
            return
        others = [link.status for link in self.links if not link.is_ready]
        coming = [status for status in others if status.phase not in _GONE]
        self.status = (coming or others)[0]

    def _broken(self, link: Link) -> None:
        """The connection to an engine elsewhere ended, and with it what was on its way. Whether the engine did, we are
        told: its requests need not wait for that. An engine that lives ends them when we join again."""
        log.warning("the connection to engine %d ended", link.index)
        self._replay(link, b"", b"")

    def _check(self) -> None:
        """What is lost at the end of a conversation is noticed by the next message, so there must be one."""
        for link in self.links:
            if link.streams or link.is_unsure:
                link.is_unsure = False
                self._send(link, pack(Kind.CHECK, Empty()))

    def _reset(self, link: Link, why: str) -> None:
        """Something between us and an engine was lost. We join again, which ends there what we had, and ask again."""
        if link.socket is None:
            return  # that is under way: these are the last messages of the old socket
        log.warning("engine %d: %s: we join again, and ask again for %d choices", link.index, why, len(link.streams))
        for stream in dict.fromkeys(link.streams.values()):
            stream.num_resets += 1
        self._replay(link, b"", b"")

    def _replay(self, link: Link, suspects: bytes, culprits: bytes) -> None:
        """What the engine had is lost. Who was to blame fails; the others are asked for again, from where they are.

        What has arrived counts; what has not goes with the old socket, lest it comes a second time."""
        running, to_blame = set(array("Q", suspects)), set(array("Q", culprits))
        before = self.num_replayed, self.num_quarantined
        socket, link.socket = link.socket, None
        if socket is not None:
            self._dealers.drop(socket)
        streams = link.take_all()
        self._connect(link)
        for stream in streams:
            if not to_blame.isdisjoint(stream.live_ids):
                self.num_quarantined += 1
                self._give_up(stream, EngineRejected(500, _QUARANTINED, "request_quarantined"))
            elif stream.num_resets > MOST_RESETS:
                text = f"Messages to or from engine {link.index} were lost {stream.num_resets} times in a row."
                self._give_up(stream, EngineRejected(503, text, "engine_dead"))
            else:
                self.num_replayed += 1
                self._ask(stream, stream.replay(running), link)
        if self.on_replay is not None:
            self.on_replay(link.index, self.num_replayed - before[0], self.num_quarantined - before[1])

    def _connect(self, link: Link) -> None:
        if not link.address or link.status.phase in _NOWHERE:
            return
        take, on_break = (lambda frames: self._take(link, frames)), (lambda: self._broken(link))
        link.session = Session(later_id(link.session.id))
        link.socket = self._dealers.open(link.address, take, on_break)
        self._send(link, pack(Kind.JOIN, Join(self._api_index)))
        self._send_limit(link)

    def _send_limit(self, link: Link) -> None:
        """An engine that is started again has the limits of the configuration."""
        if self._limit is not None:
            self._send(link, pack(Kind.LIMIT, self._limit))

    def _send(self, link: Link, message: list[Any]) -> None:
        if link.socket is not None:
            self._dealers.send(link.socket, link.session.stamped(message))

    # What an engine says

    def _take(self, link: Link, frames: list[bytes]) -> None:
        """Raises NotNext for a message that does not count."""
        stamp, rest = Stamp.of(frames[0]), frames[1:]
        if stamp.kind == Kind.RESET and stamp.session == link.session.id:
            self._refused(link, unpack(rest[0], Reset))
            return
        try:
            link.session.take(stamp, rest)
        except Gap as error:
            self._reset(link, str(error))
            return
        except NotNext:
            if stamp.session != link.session.id:  # did it not hear our JOIN? Else it works on for nobody
                self._send(link, pack(Kind.CHECK, Empty()))
            raise
        try:
            self._take_next(link, stamp.kind, rest)
        except (ValueError, IndexError, TypeError, msgspec.DecodeError) as error:
            self._reset(link, f"message {stamp.number} makes no sense: {error}")

    def _refused(self, link: Link, reset: Reset) -> None:
        link.session = Session(max(link.session.id, reset.latest))  # the next one will be above
        self._reset(link, "it does not know our session, or has missed a message")

    def _take_next(self, link: Link, kind: bytes, frames: list[bytes]) -> None:
        if kind == Kind.STEP:
            self._take_step(link, frames)
        elif kind == Kind.STATS:
            link.take_stats(unpack(frames[0], EngineStats))
        elif kind == Kind.REJECT:
            self._take_reject(link, unpack(frames[0], Reject))
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def _take_step(self, link: Link, frames: list[bytes]) -> None:
        streams, touched = link.streams, dict[ZmqStream, None]()
        header, now = unpack(frames[0], StepHeader), monotonic()
        outputs = outputs_of_step(header, frames[1:])
        for id, event in events_of_step(header, frames[1:], now):
            stream = streams.get(id)
            if stream is not None:
                stream.happened(event._replace(choice=id - stream.first_id))
        for id, output in outputs:
            stream = streams.get(id)
            if stream is None:  # aborted while this was on its way
                link.is_unsure = True
                continue
            output.choice = id - stream.first_id
            stream.put(output)
            if output.prefill_seconds >= 0:
                stream.happened(event_in_step(header, output.choice, now, "first_token"))
            touched[stream] = None
            if output.finish:
                stream.happened(event_in_step(header, output.choice, now, "finished"))
                link.remove(stream, [id])
                self._forget_if_over(stream)
        for stream in touched:
            link.started(stream)
            stream.wake()

    def _take_reject(self, link: Link, reject: Reject) -> None:
        stream = link.streams.get(reject.id)
        if stream is not None:
            others = [id for id in stream.live_ids if not reject.id <= id < reject.id + reject.n]
            if others:  # choices that were replayed one by one
                self._send(link, pack(Kind.ABORT, Empty(), array("Q", others)))
            link.remove(stream, stream.live_ids)
            self._give_up(stream, EngineRejected(reject.status, reject.message, reject.code, reject.param))
