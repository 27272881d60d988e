"""ZmqEngineClient: one API server's sockets to the engines and to the supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import msgspec
import zmq

from .. import __version__
from ..config import Config
from ..sockets import connect_dealer, readable
from ..wire import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    AddRequest,
    Empty,
    EngineFacts,
    EngineStats,
    Hello,
    Join,
    Kind,
    Limit,
    Reject,
    SamplingParams,
    Status,
    StepHeader,
    api_identity,
    first_request_id,
    pack,
    unpack,
)
from . import EngineDead, EngineRejected
from .steps import outputs_of_step
from .streams import ZmqStream

log = logging.getLogger(__name__)
MESSAGES_A_TURN = 64  # then other tasks of the event loop get theirs
_QUARANTINED = "The engine died twice while it worked on this request; it is not tried again."


class Link:
    """One engine: its address, the socket to the process that is there now, the streams that wait for it, what it said
    of itself last."""

    def __init__(self, address: str, socket: zmq.Socket[bytes]) -> None:
        self.address, self.socket = address, socket
        self.streams: dict[int, ZmqStream] = {}  # by choice id; only choices that run
        self.stats = EngineStats()


def sum_of(stats: Sequence[EngineStats]) -> EngineStats:
    """The numbers of several engines added up."""
    columns = zip(*(msgspec.structs.astuple(each) for each in stats), strict=True)
    return EngineStats(*(_sum(column) for column in columns))


def _sum(column: Sequence[Any]) -> Any:
    if isinstance(column[0], tuple):
        return tuple(map(sum, zip_longest(*column, fillvalue=0)))
    return sum(column)


class ZmqEngineClient:
    """Sends requests, hands what comes back to their streams, and passes on what the supervisor says. When an engine
    died it asks the next one for the rest of what was open (``_replay``).

    Knows ids and frames; not text, not HTTP. All of it runs in the event loop that ``start`` was called in: no task,
    no thread, no lock. ``on_shutdown(now)`` is called with False when running requests are to be finished and no more
    taken, and with True when they are to be ended at once; ``on_status`` with every news of the engine's phase;
    ``on_replay(replayed, given up)`` with how many requests went either way when an engine had died.
    """

    def __init__(
        self,
        config: Config,
        api_index: int,
        control_address: str,
        data_addresses: Sequence[str],
        *,
        launch: int = 0,
        on_shutdown: Callable[[bool], None] | None = None,
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        """``launch``: how many API servers of this index ran before."""
        self.on_shutdown, self.on_status = on_shutdown, on_status
        self.on_replay: Callable[[int, int], None] | None = None
        self._config, self._index = config, api_index
        self._control_address, self._data_addresses = control_address, data_addresses
        self._status = Status("starting")
        self._facts: EngineFacts | None = None
        self._num_shutdowns = 0
        self.num_replayed = self.num_quarantined = 0
        self._max_num_queued_reqs: int | None = None  # where it was changed
        self._next_id = first_request_id(api_index, launch)
        self._links: list[Link] = []
        self._link_of: dict[ZmqStream, Link] = {}
        self._takers: dict[zmq.Socket[bytes], Callable[[list[bytes]], None]] = {}

    # EngineClient

    @property
    def status(self) -> Status:
        return self._status

    @property
    def facts(self) -> EngineFacts | None:
        return self._facts

    @property
    def stats(self) -> EngineStats:
        """Of all engines together."""
        if len(self._links) == 1:
            return self._links[0].stats
        return sum_of([link.stats for link in self._links])

    def generate(
        self,
        token_ids: bytes,
        params: SamplingParams,
        *,
        n: int = 1,
        priority: int = 0,
        eos_token_ids: tuple[int, ...] = (),
        cache_salt: bytes = b"",
    ) -> ZmqStream:
        """See EngineClient. The request is sent when the block is entered."""
        if params.seed is None:
            raise ValueError("params.seed is not set")
        first_id = self._next_id
        self._next_id += n
        request = AddRequest(first_id, n, priority, params, eos_token_ids, cache_salt)
        return ZmqStream(request, token_ids, self._begin, self._abort)

    def limit_queue(self, max_num_queued_reqs: int) -> None:
        self._max_num_queued_reqs = max_num_queued_reqs
        for link in self._links:
            self._send_limit(link)

    # Its life

    def start(self) -> None:
        """Connects; says HELLO and JOIN. Both ends may still be starting. Call it inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._control = connect_dealer(self._context, self._control_address, api_identity(self._index))
        self._receive_by(self._control, self._take_control)
        hello = Hello("api", self._index, os.getpid(), PROTOCOL_VERSION, __version__, self._config.digest())
        self._send(self._control, pack(Kind.HELLO, hello))
        for address in self._data_addresses:
            link = Link(address, connect_dealer(self._context, address, api_identity(self._index)))
            self._links.append(link)
            self._join(link)

    def close(self) -> None:
        """Streams that are still open fail."""
        self._fail_all(EngineDead("the client was closed"))
        for socket in self._takers:
            self._loop.remove_reader(socket)
        self._takers.clear()
        self._context.destroy(linger=200)  # the ABORTs of a moment ago still go out

    # Sending

    def _join(self, link: Link) -> None:
        self._receive_by(link.socket, self._taker(link))
        self._send(link.socket, pack(Kind.JOIN, Join(self._index)))
        self._send_limit(link)

    def _send_limit(self, link: Link) -> None:
        """An engine that is started again has the limit of the configuration."""
        if self._max_num_queued_reqs is not None:
            self._send(link.socket, pack(Kind.LIMIT, Limit(self._max_num_queued_reqs)))

    def _begin(self, stream: ZmqStream) -> None:
        request, token_ids = stream.first_message()
        if self._status.phase == "dead":
            stream.fail(EngineDead(self._status.message))
            return
        if len(token_ids) > MAX_FRAME_BYTES:  # the engine would hang up on the whole API server
            text = f"The prompt has {len(token_ids) // 4} tokens; no model here takes as many."
            stream.fail(EngineRejected(400, text, "context_length_exceeded"))
            return
        link = min(self._links, key=lambda link: len(link.streams))
        self._link_of[stream] = link
        for id in range(request.id, request.id + request.n):
            link.streams[id] = stream
        self._send(link.socket, pack(Kind.ADD, request, token_ids))

    def _abort(self, stream: ZmqStream, ids: list[int]) -> None:
        link = self._link_of.get(stream)
        if link is None:
            return
        for id in ids:
            del link.streams[id]
        self._forget_if_over(stream)
        self._send(link.socket, pack(Kind.ABORT, Empty(), array("Q", ids)))

    def _replay(self, suspects: bytes, culprits: bytes) -> None:
        """The engines' requests are lost. Who was to blame fails; the others are asked for again, from where they are.

        What has arrived counts; what has not goes with the old sockets, lest it comes a second time."""
        running, to_blame = set(array("Q", suspects)), set(array("Q", culprits))
        before = self.num_replayed, self.num_quarantined
        for link in self._links:
            self._loop.remove_reader(link.socket)
            take = self._takers.pop(link.socket)
            while readable(link.socket):
                self._receive_one(link.socket, take)
            link.socket.close(linger=0)
            link.socket = connect_dealer(self._context, link.address, api_identity(self._index))
            link.stats = EngineStats()
            self._join(link)
            for stream in dict.fromkeys(link.streams.values()):
                if to_blame.isdisjoint(stream.live_ids):
                    self.num_replayed += 1
                    for request, token_ids in stream.replay(running):
                        self._send(link.socket, pack(Kind.ADD, request, token_ids))
                else:
                    self.num_quarantined += 1
                    self._give_up(link, stream, EngineRejected(500, _QUARANTINED, "request_quarantined"))
        if self.on_replay is not None:
            self.on_replay(self.num_replayed - before[0], self.num_quarantined - before[1])

    def _give_up(self, link: Link, stream: ZmqStream, error: Exception) -> None:
        for id in stream.live_ids:
            del link.streams[id]
        self._link_of.pop(stream, None)
        stream.fail(error)

    def _send(self, socket: zmq.Socket[bytes], message: list[Any]) -> None:
        socket.send_multipart(message, flags=zmq.NOBLOCK)
        if readable(socket):  # the send may have swallowed the event that the loop waits for
            self._loop.call_soon(self._receive, socket)

    # Receiving

    def _receive_by(self, socket: zmq.Socket[bytes], take: Callable[[list[bytes]], None]) -> None:
        self._takers[socket] = take
        self._loop.add_reader(socket, self._receive, socket)
        self._loop.call_soon(self._receive, socket)

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        take = self._takers.get(socket)
        if take is None:
            return  # closed meanwhile
        for _ in range(MESSAGES_A_TURN):
            if not readable(socket):
                return
            self._receive_one(socket, take)
        self._loop.call_soon(self._receive, socket)

    def _receive_one(self, socket: zmq.Socket[bytes], take: Callable[[list[bytes]], None]) -> None:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        try:
            take(frames)
        except (ValueError, IndexError, TypeError, msgspec.DecodeError) as error:
            log.error("message of %d frames dropped: %s", len(frames), error)

    def _taker(self, link: Link) -> Callable[[list[bytes]], None]:
        def take(frames: list[bytes]) -> None:
            kind = frames[0]
            if kind == Kind.STEP:
                self._take_step(link, frames)
            elif kind == Kind.STATS:
                link.stats = unpack(frames[1], EngineStats)
            elif kind == Kind.REJECT:
                self._take_reject(link, unpack(frames[1], Reject))
            else:
                raise ValueError(f"unknown kind {kind!r}")

        return take

    def _take_step(self, link: Link, frames: list[bytes]) -> None:
        streams, touched = link.streams, dict[ZmqStream, None]()
        for id, output in outputs_of_step(unpack(frames[1], StepHeader), frames[2:]):
            stream = streams.get(id)
            if stream is None:
                continue  # aborted while this was on its way
            output.choice = id - stream.first_id
            stream.put(output)
            touched[stream] = None
            if output.finish:
                del streams[id]
                self._forget_if_over(stream)
        for stream in touched:
            stream.wake()

    def _take_reject(self, link: Link, reject: Reject) -> None:
        stream = link.streams.get(reject.id)
        if stream is not None:
            others = [id for id in stream.live_ids if not reject.id <= id < reject.id + reject.n]
            if others:  # choices that were replayed one by one
                self._send(link.socket, pack(Kind.ABORT, Empty(), array("Q", others)))
            self._give_up(link, stream, EngineRejected(reject.status, reject.message, reject.code, reject.param))

    def _take_control(self, frames: list[bytes]) -> None:
        kind = frames[0]
        if kind == Kind.STATUS:
            before, self._status = self._status, unpack(frames[1], Status)
            status = self._status
            self._facts = status.facts or self._facts
            if status.restarts != before.restarts:
                self._replay(status.suspects, status.culprits)
            if status.phase == "dead":
                self._fail_all(EngineDead(status.message))
            if self.on_status is not None:
                self.on_status(status)
        elif kind == Kind.SHUTDOWN:
            self._num_shutdowns += 1
            if self.on_shutdown is not None:
                self.on_shutdown(self._num_shutdowns > 1 or self._status.phase == "dead")
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def _fail_all(self, error: Exception) -> None:
        for link in self._links:
            link.streams.clear()
        streams = list(self._link_of)
        self._link_of.clear()
        for stream in streams:
            stream.fail(error)

    def _forget_if_over(self, stream: ZmqStream) -> None:
        if not stream.live_ids:
            self._link_of.pop(stream, None)
