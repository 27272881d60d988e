"""The C++ scheduler: block pool, KV cache, requests, batches. No clock, thread, socket, device or Python inside."""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
from typing_extensions import Buffer

_Array = Buffer | npt.NDArray[Any]  # numpy's stubs declare the buffer protocol for Python >= 3.12 only

class Config:
    """Capacities. Raises ValueError naming the field and its value if they cannot work together."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    num_clients: int  # API servers; outputs are grouped by client
    depth: int  # batches in flight: 1 plain, 2 overlapped
    enable_prefix_caching: bool
    num_host_blocks: int  # that preempted requests may leave their KV in
    swap_cost: int  # tokens that are computed in the time that a block takes to the host and back
    max_adjustments: int  # entries of the ragged logit adjustments of one batch
    hash_key: bytes  # 16 bytes, keys the prefix hash
    decode_sizes: list[int]  # sizes that batches are padded to, ascending: decodes only,
    mixed_seq_sizes: list[int]  # and others; a batch above the last one keeps its own
    mixed_token_sizes: list[int]
    min_shared_tokens: int  # decodes that begin alike are listed where that spares reading so many; 0: never
    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        num_clients: int = 1,
        depth: int = 1,
        enable_prefix_caching: bool = True,
        num_host_blocks: int = 0,
        swap_cost: int = 0,
        max_adjustments: int = 0,  # 0: 4 * vocab_size
        hash_key: bytes = b"",  # empty: a fixed key (tests); the engine passes a random one
        decode_sizes: Sequence[int] = (),
        mixed_seq_sizes: Sequence[int] = (),
        mixed_token_sizes: Sequence[int] = (),
        min_shared_tokens: int = 0,
    ) -> None: ...

def batch_layout(config: Config) -> tuple[int, dict[str, tuple[int, str, int]]]:
    """(bytes of an arena, column name -> (byte offset, numpy dtype string, capacity)). Offsets are 64-byte aligned."""

class Batch:
    """One step's work, written into an arena. The sizes; the columns are read from the arena by ``batch_layout``."""

    step: int
    arena: int  # which of the arenas given to the Scheduler holds it
    num_tokens: int
    num_seqs: int
    num_decodes: int  # the first ones: each the token that was picked last
    num_sampled: int
    max_query_len: int
    max_seq_len: int
    num_copies: int
    num_swap_outs: int  # the first entries of swap_src and swap_dst, device -> host; before the copies
    num_swap_ins: int  # those behind them, host -> device
    num_adjustments: int
    num_prefixes: int  # groups of decodes that begin with the same blocks; 0: none
    bytes_used: int
    padded_tokens: int  # rows of the columns that hold values
    padded_seqs: int
    is_padded: bool  # to sizes of the configuration

class Outputs:
    """What a step gave, as columns grouped by client: client c owns rows [client_start[c], client_start[c+1]).
    Valid until the next commit. Each column is a read-only memoryview."""

    step: int
    num_tokens: int  # of the batch
    num_seqs: int
    scheduled: int  # ``now`` of its schedule()
    num_rows: int
    client_start: memoryview  # i32 [num_clients + 1]
    ids: memoryview  # u64
    tokens: memoryview  # i32
    finish: memoryview  # u8, FinishReason
    cached_tokens: memoryview  # i32: prompt tokens found in the cache, on a request's first row; -1 after
    rows: memoryview  # i32: the sampled row of the batch it came from (index into the executor's logprobs)
    num_preemptions: memoryview  # i32: of the choice so far
    event_start: memoryview  # i32 [num_clients + 1], of the rows of the events; see cpp/core/outputs.h
    event_ids: memoryview  # u64
    event_values: memoryview  # i32
    event_kinds: memoryview  # u8: wire.StepEvent | wire.WaitedFor << 4
    scheduled_at: memoryview  # i64: ``now`` of the step that first ran it, on a request's first row; -1 after

class Stats:
    num_running: int
    num_waiting: int
    waiting_since: int  # of the one that has waited longest, by the clock of add(); -1: nobody waits
    blocks_used: int
    blocks_total: int
    empty_slots: int  # places of tokens in the used blocks that no token has taken yet
    num_swapped: int  # of the waiting ones: the host keeps their KV
    host_blocks_used: int
    host_blocks_total: int
    blocks_swapped_out: int
    blocks_swapped_in: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    step_tokens: int
    step_token_counts: list[int]  # batches of at most wire.STEP_TOKEN_BOUNDS[i] tokens; the last: of more

class Scheduler:
    def __init__(self, config: Config, arenas: Sequence[_Array]) -> None:
        """``arenas``: depth + 1 writable buffers of ``batch_layout(config)[0]`` bytes."""

    def add(
        self,
        id: int,
        tokens: _Array,  # i32
        *,
        num_generated: int = 0,  # the last ones of tokens: picked by an earlier engine, not given out again
        first_choice: int = 0,  # of the request that this was a part of: whose seed choice 0 takes
        client: int = 0,
        n: int = 1,
        priority: int = 0,
        max_tokens: int = 16,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),  # eos included unless ignored
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int = 0,
        num_logprobs: int = -1,
        logit_bias: Sequence[tuple[int, float]] = (),
        allowed_token_ids: Sequence[int] = (),
        banned_token_ids: Sequence[int] = (),
        cache_salt: bytes = b"",
        now: int = 0,  # of the clock of schedule()
    ) -> None:
        """Queues choices id .. id+n-1 of one prompt. Raises ValueError, with the numbers, for what can never run."""

    def abort(self, ids: _Array) -> int:
        """``ids``: u64. Unknown ones are ignored (the request may have just finished). Returns how many were live.
        An aborted request gives no further output."""

    def schedule(self, now: int = 0) -> Batch | None:
        """``now``, of any clock, is what ``Outputs.scheduled_at`` says of the requests that run for the first time."""

    def commit(self, step: int, tokens: _Array) -> Outputs:
        """``tokens``: i32, one per sampled row of that step. Steps are committed in order, else ValueError."""

    def limit_running(self, max_running: int) -> None:
        """At most so many run from the next batch on; 1 to max_num_seqs, else ValueError."""

    def ids_in_flight(self) -> bytes:
        """u64, native order: requests with a row in a batch that is not committed, each once."""

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is in flight."""

    @property
    def num_open(self) -> int:
        """Requests that wait or run, and those that have ended while a batch in flight still has a row of theirs."""

    def stats(self) -> Stats: ...
    def record(self, memory: _Array, num_steps: int) -> None:
        """From now on ``memory`` has the last ``num_steps`` steps; laid out as in cpp/core/recorder.h."""

    def forget_prefixes(self) -> bool: ...
    def check_invariants(self) -> None:
        """Every invariant; raises RuntimeError (InternalError) at the first that is broken. For tests."""

def replay(config: bytes, events: bytes) -> tuple[bytes, str]:
    """A recording's inputs once more: what was decided, in its words (i64), and why it ended early ("": it did not).
    ``config``: the header's words; ``events``: from a state on. Raises ValueError for what no recorder wrote."""
