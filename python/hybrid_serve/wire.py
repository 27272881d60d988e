"""What crosses between processes: typed frames, nothing else; no pickle, no knowledge of sockets' owners.

A message is a list of ZMQ frames: ``[kind, header, array, ...]``. ``kind`` is one byte, ``header`` a msgpack-encoded
Struct, arrays are raw little-endian bytes (so token ids never become Python objects on the way). Between API server and
engine the kind's frame says which message it is, too (``session.Stamp``).

Topology: the supervisor binds one ROUTER (control: HELLO, STATUS), each engine binds one ROUTER (data); engines and API
servers connect DEALERs. A head of headless engines binds one ROUTER more, for their nodes. Request ids are unique in a
server, one per choice: see ``first_request_id``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeVar

import msgspec

PROTOCOL_VERSION = 10
MAX_FRAME_BYTES = 64 * 2**20
API_INDEX_SHIFT = 48
LAUNCH_SHIFT = 36
ALL_ENGINES = -1  # instead of the index of one
LAST_WORDS_OF = b"failed-"  # before the identity of a process that says FAILED and ends
# Of EngineStats.step_token_counts; as in cpp/core/stats.h.
STEP_TOKEN_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

# What the engine's loop does, in this order; commit: the core takes in the picked tokens.
STEP_PHASES = ("messages", "schedule", "submit", "wait", "commit", "send")
STEP_GAP_BOUNDS = (0, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000)  # microseconds


class Kind:
    """First frame of a message."""

    # API server -> engine
    ADD = b"\x01"  # AddRequest, token ids i32
    ABORT = b"\x02"  # Empty, request ids u64
    LIMIT = b"\x04"  # Limit: how many may wait and run from now on
    JOIN = b"\x03"  # Join: an API server makes itself known; a session begins
    CHECK = b"\x05"  # Empty: STATS is the answer; each side sees by the other's number whether something was lost
    # engine -> API server
    STEP = b"\x11"  # StepHeader, columns (see StepHeader)
    REJECT = b"\x12"  # Reject
    STATS = b"\x13"  # EngineStats
    RESET = b"\x14"  # Reset: the session is not the one that runs here; it has no number of its own
    # control: engine or API server <-> supervisor
    HELLO = b"\x21"  # Hello
    STATUS = b"\x22"  # Status
    FAILED = b"\x23"  # StartupFailure
    SHUTDOWN = b"\x24"  # Empty; to an API server: finish what runs, and when it comes a second time: end now
    READY = b"\x29"  # Empty: an API server takes requests from now on
    REFUSED = b"\x28"  # Refused: at the port for headless engines, to API servers
    # node of headless engines <-> its head
    WELCOME = b"\x25"  # Welcome: the answer to a node's HELLO; FAILED: it is refused
    PULSE = b"\x26"  # Empty; both ways, a few times in the time that a silence may last
    LEAVE = b"\x27"  # Empty: the node ends
    # API server <-> supervisor of several models
    MODEL = b"\x31"  # ModelState
    USE = b"\x32"  # Use
    ORDER = b"\x33"  # Order


class FinishReason(IntEnum):
    """Why a choice ended; numbers as in cpp/common/types.h."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3


class StepEvent(IntEnum):
    """What a step did to a choice besides picking a token; numbers as in cpp/common/types.h."""

    ADMITTED = 1  # value: prompt tokens found in the cache
    CHUNK = 2  # value: its tokens, of the prompt or computed once more
    PREEMPTED = 3  # value: tokens whose KV is lost


class WaitedFor(IntEnum):
    """Why a choice was not admitted before; numbers as in cpp/common/types.h."""

    NOTHING = 0
    BLOCKS = 1
    TOKENS = 2  # of a step's budget
    SEQUENCES = 3
    ADJUSTMENTS = 4


class Empty(msgspec.Struct, array_like=True):
    pass


class SamplingParams(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """How tokens are picked and when a choice ends; OpenAI's and vLLM's names. Bounds are checked at the HTTP edge and
    again in the C++ core (``ValueError``)."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None  # None: drawn by the API server when the request arrives, so that a replay is exact
    stop: tuple[str, ...] = ()  # looked for by the detokenizer, on the API side
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    banned_token_ids: tuple[int, ...] = ()
    logprobs: int = -1  # -1: none; 0: of the sampled token; n: and of the n most likely


class AddRequest(msgspec.Struct, array_like=True, frozen=True):
    """One prompt. Followed by its token ids (i32). ``id .. id + n - 1`` are its choices.

    The last fields continue a request whose engine died (``streams.ZmqStream.replay``)."""

    id: int
    n: int
    priority: int
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()  # end the choice unless ignore_eos; part of the model, sent for statelessness
    cache_salt: bytes = b""
    num_generated: int = 0  # the last ones of the token ids: they count as picked, and are not sent again; needs n = 1
    first_choice: int = 0  # of the request that this was a part of: whose seed choice 0 takes
    is_replay: bool = False  # it was let in before: a full queue does not refuse it
    is_suspect: bool = False  # it ran when the engine died, and may be the cause: it is tried on its own first


class Limit(msgspec.Struct, array_like=True, frozen=True):
    max_num_queued_reqs: int  # 0: any number
    max_num_seqs: int  # 0: as many as there is room for


class Join(msgspec.Struct, array_like=True, frozen=True):
    api_index: int


class Reset(msgspec.Struct, array_like=True, frozen=True):
    latest: int  # id of the latest session with this API server: the next one is above


class StepHeader(msgspec.Struct, array_like=True, frozen=True):
    """What one step gave the requests of one API server, as columns of ``rows`` entries in this order, then:
    ids u64, tokens i32, finish u8, cached_tokens i32 (-1: said before), num_preemptions i32 (so far),
    scheduled_at i64 (when the choice first ran, by the clock of ``now``; -1: said before), if ``logprob_width`` > 0:
    logprobs f32 [rows, width], logprob_ids i32 [rows, width] (sampled first; -1: not asked), ranks i32 [rows]; if
    ``events`` > 0, of so many entries: ids u64, values i32, kinds u8 (StepEvent | WaitedFor << 4)."""

    step: int
    rows: int
    logprob_width: int
    now: int = 0  # microseconds of the engine's clock when this was sent
    events: int = 0
    scheduled: int = 0  # when the step began, by the same clock
    num_tokens: int = 0  # of the whole batch
    num_seqs: int = 0


class Reject(msgspec.Struct, array_like=True, frozen=True):
    """The engine refuses a request; becomes an HTTP error. ``code`` is OpenAI's string code."""

    id: int
    n: int
    status: int
    message: str
    code: str
    param: str | None = None


class EngineStats(msgspec.Struct, array_like=True, frozen=True):
    """Gauges and running totals of an engine; sent to API servers at most four times a second, and on becoming idle."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    steps: int = 0
    step_tokens: int = 0
    step_token_counts: tuple[int, ...] = ()  # steps of at most STEP_TOKEN_BOUNDS[i] tokens; the last: of more
    step_gap_us: int = 0  # that the device had nothing to do between two steps, although there was work
    step_gap_counts: tuple[int, ...] = ()  # gaps of at most STEP_GAP_BOUNDS[i]; the last: longer ones
    num_swapped: int = 0  # of those that wait: the host keeps their KV
    host_blocks_used: int = 0
    host_blocks_total: int = 0
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    num_dropped: int = 0  # messages that no API server of this engine sends, or that came twice, late or cut
    num_refused: int = 0  # connections without our key, where the engine listens to a network
    may_run: int = 0  # requests at once; 0: not said
    admission_seconds: float = 0.0  # from one request that is let in to the next, where others wait; 0: not known
    waiting_seconds: float = 0.0  # of the request that has waited longest; 0: none waits
    empty_slots: int = 0  # places of tokens in the used KV blocks that no token has taken yet
    step_age: float = 0.0  # seconds since the last step was over, or since the engine was there
    phase_us: tuple[int, ...] = ()  # of all steps, by STEP_PHASES; without the time in which there was no work


class Hello(msgspec.Struct, array_like=True, frozen=True):
    role: str  # "engine", "api", "ray" or "node"
    index: int
    pid: int
    protocol: int
    version: str
    config_digest: str
    count: int = 1  # engines of a node, whose index is the first one's


class Welcome(msgspec.Struct, array_like=True, frozen=True):
    """What a node's engines must know of their head."""

    num_api_servers: int


class Refused(msgspec.Struct, array_like=True, frozen=True):
    num: int  # connections without our key, since the start


class EngineFacts(msgspec.Struct, array_like=True, frozen=True):
    """What only the loaded model can tell; part of the READY status."""

    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    dtype: str
    device: str
    cache_bytes: int = 0  # of the host's memory that the KV blocks may take


class Status(msgspec.Struct, array_like=True, frozen=True):
    """Engine -> supervisor -> API servers. ``phase``: starting, loading_weights, allocating, ready, not_responding,
    restarting, draining, dead; away: on another machine, from which nothing is heard; unloaded, failed: of a model
    among several, which is not in memory, or could not be loaded. What follows ``facts`` is the supervisor's to say."""

    phase: str
    progress: float = 0.0  # of the phase, 0 to 1
    message: str = ""
    seconds: float = 0.0  # the phase so far
    facts: EngineFacts | None = None
    restarts: int = 0  # of the engine so far: one that differs from the last says that its requests are lost
    suspects: bytes = b""  # u64: the requests that ran when it died
    culprits: bytes = b""  # u64: the one of them, all its choices, that ran on trial then
    engine: int = 0  # whose it is
    address: str = ""  # of its data socket; empty: the one that was planned


class ModelState(msgspec.Struct, array_like=True, frozen=True):
    """Of one model among several. ``phase``: unloaded, loading, ready, draining (its open requests end, new ones wait,
    then it is put away), failed."""

    name: str
    phase: str
    message: str = ""  # why it failed
    drain: int = 0  # how often it was drained: an answer names the drain that it is about


class Use(msgspec.Struct, array_like=True, frozen=True):
    """What an API server does with a model; said whenever it changes, and in answer to a drain."""

    name: str
    is_open: bool = False  # requests that were let in have not ended
    is_waited_for: bool = False  # requests have not been let in
    drain: int = 0  # the last one that it knows of


class Order(msgspec.Struct, array_like=True, frozen=True):
    """An admin wants the model loaded, or put away."""

    name: str
    is_load: bool


class StartupFailure(msgspec.Struct, array_like=True, frozen=True):
    """The one box a failed start ends with."""

    code: str  # HS-E###
    what: str
    why: str
    fix: str
    exit_code: int = 1


def identity_of(role: str, index: int) -> bytes:
    """By which a process's DEALERs are known to the ROUTERs."""
    return f"{role}-{index}".encode()


def api_identity(api_index: int) -> bytes:
    return identity_of("api", api_index)


def first_request_id(api_index: int, launch: int) -> int:
    """Of an API server's process; ``launch`` counts those of this index. Ids of an earlier one are never used again:
    the engine may still have its requests."""
    return api_index << API_INDEX_SHIFT | launch % (1 << API_INDEX_SHIFT - LAUNCH_SHIFT) << LAUNCH_SHIFT


def engine_identity(engine_index: int) -> bytes:
    return identity_of("engine", engine_index)


T = TypeVar("T", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()
# Of every header, now: msgspec evaluates the annotations of all fields, for which the first message would have to wait.
_decoders: dict[type, Any] = {
    each: msgspec.msgpack.Decoder(each) for each in msgspec.Struct.__subclasses__() if each.__module__ == __name__
}


def pack(kind: bytes, header: msgspec.Struct, *arrays: Any) -> list[Any]:
    """Frames of a message; arrays are anything with the buffer protocol."""
    return [kind, _encoder.encode(header), *arrays]


def unpack(frame: Any, as_type: type[T]) -> T:
    """Decodes a header. Raises ``msgspec.DecodeError`` for anything that is not one."""
    return _decoders[as_type].decode(frame)  # type: ignore[no-any-return]
