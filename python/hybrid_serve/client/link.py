"""Link: one engine as an API server sees it."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import zmq

from ..session import Session
from ..wire import EngineStats, Status
from .open_counts import OpenCounts
from .streams import ZmqStream

PROMPT_TOKENS_A_REQUEST = 512  # so many tokens that nobody has computed yet are as much work ahead as a request
WAITING_WEIGHT = 6.0  # of a request that waits in an engine whose cache is full


class Link:
    """The socket to the process that is there now, the streams that wait for it, what was said of it last, and from
    these its load. Knows no other engine."""

    def __init__(
        self, index: int, address: str, open_counts: OpenCounts, clock: Callable[[], float] = monotonic
    ) -> None:
        self.index, self.address, self._open_counts = index, address, open_counts
        self._clock = clock
        open_counts.check(index)
        self.socket: zmq.Socket[bytes] | None = None
        self.session = Session(0)  # over that socket
        self.is_unsure = False  # the engine may have missed an ABORT
        self.streams: dict[int, ZmqStream] = {}  # by choice id; only choices that run
        self.status = Status("starting", engine=index)
        self._forget()

    def _forget(self) -> None:
        self.stats, self._stats_since = EngineStats(), self._clock()
        self._unstarted: dict[ZmqStream, int] = {}  # prompt tokens of streams of which nothing has come
        self._unstarted_tokens = 0

    @property
    def is_ready(self) -> bool:
        return self.status.phase == "ready"

    def take_stats(self, stats: EngineStats) -> None:
        self.stats, self._stats_since = stats, self._clock()

    @property
    def stats_age(self) -> float:
        return self._clock() - self._stats_since

    @property
    def num_open(self) -> int:
        return len(self.streams) + self._open_counts.in_engine_elsewhere(self.index)

    @property
    def load(self) -> float:
        """Work that is ahead of a new request, in requests; a cache that fills up makes waiting dearer."""
        stats = self.stats
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        crowd = WAITING_WEIGHT * stats.num_waiting * max(0.0, usage - 0.5)
        return self.num_open + self._unstarted_tokens / PROMPT_TOKENS_A_REQUEST + crowd

    @property
    def wait_seconds(self) -> float:
        """Until a new request would be let in, by the pace of the last ones; 0: there is room, or no pace is known."""
        stats = self.stats
        num_open = max(stats.num_running + stats.num_waiting, self.num_open)
        ahead = num_open - stats.may_run + 1 if stats.may_run else 0
        if stats.num_waiting:  # perhaps for blocks, while fewer run than may
            ahead = max(ahead, stats.num_waiting + 1)
        return max(0, ahead) * stats.admission_seconds

    def add(self, stream: ZmqStream, ids: range, num_tokens: int) -> None:
        """The engine is asked for these choices of the stream, behind so many tokens."""
        for id in ids:
            self.streams[id] = stream
        self._open_counts.set_in_engine(self.index, len(self.streams))
        self._unstarted[stream] = self._unstarted.get(stream, 0) + num_tokens
        self._unstarted_tokens += num_tokens

    def started(self, stream: ZmqStream) -> None:
        self._unstarted_tokens -= self._unstarted.pop(stream, 0)

    def remove(self, stream: ZmqStream, ids: list[int]) -> None:
        """Nobody waits for these choices any more."""
        for id in ids:
            del self.streams[id]
        self._open_counts.set_in_engine(self.index, len(self.streams))
        if not any(id in self.streams for id in stream.live_ids):
            self.started(stream)

    def take_all(self) -> list[ZmqStream]:
        """The process is gone: its streams, which wait for it no longer."""
        streams = list(dict.fromkeys(self.streams.values()))
        self.streams.clear()
        self._open_counts.set_in_engine(self.index, 0)
        self._forget()
        return streams
