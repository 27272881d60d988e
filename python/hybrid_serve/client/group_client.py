"""GroupClient: an EngineClient over the engines of one model."""

from __future__ import annotations

from collections.abc import Sequence

from ..wire import AddRequest, EngineFacts, Limit, SamplingParams, Status
from .group import EngineGroup
from .link import Link
from .streams import ZmqStream


class GroupClient:
    """Numbers requests and gives them to the group. Knows ids; not text, not HTTP, not which engine has what."""

    def __init__(self, group: EngineGroup, first_id: int) -> None:
        """``first_id``: see ``wire.first_request_id``."""
        self.group, self._next_id = group, first_id

    @property
    def engines(self) -> Sequence[Link]:
        return self.group.links

    @property
    def status(self) -> Status:
        return self.group.status

    @property
    def facts(self) -> EngineFacts | None:
        return self.group.facts

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
    ) -> ZmqStream:
        """See EngineClient. The request is sent when the block is entered."""
        if params.seed is None:
            raise ValueError("params.seed is not set")
        first_id = self._next_id
        self._next_id += n
        request = AddRequest(first_id, n, priority, params, eos_token_ids, cache_salt)
        return ZmqStream(request, token_ids, lambda stream: self.group.begin(stream, rank), self.group.abort)

    def limit(self, max_num_queued_reqs: int, max_num_seqs: int) -> None:
        self.group.limit(Limit(max_num_queued_reqs, max_num_seqs))
