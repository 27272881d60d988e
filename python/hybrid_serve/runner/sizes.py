"""How many bytes each part of an engine takes: a model's weights and KV, a step, what is captured. Formulas over the
model's own numbers; knows no torch, no device and no decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoint.model_spec import ModelSpec
from ..checkpoint.tensors import FloatName
from ..config import Config
from ..errors import StartupError
from ..models import family_of
from ..models.names import expected_tensors
from .pad_sizes import MIXED_TOKEN_SIZES, PadSizes, pad_sizes

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
# Of a captured kernel: an estimate, nobody says what the driver keeps. With it the default plan of an 8B model leaves
# for graphs and libraries together what ran without shortage on an 80 GB card.
GRAPH_NODE_BYTES = 2048
KERNELS_PER_LAYER = 9


class Machine(NamedTuple):
    """What a kind of device adds to the arithmetic."""

    batched_tokens: int  # of a step, where nothing is said
    workspace_bytes: int  # of libraries, and the kernels' scratch
    arenas: int  # copies of a batch in its memory
    captures: bool
    takes_all: bool  # a cache of which nothing is said takes all that is left, not what a server needs
    copy_rate: float  # bytes a second between device and host
    compute_rate: float  # operations a second in long prompts
    is_host: bool  # its memory is the host's
    total_bytes: int = 0  # that --gpu-memory-utilization is a share of; 0: it is not one


# A step of 512 tokens takes about 0.25 s on two cores with a model of 135M: that is how long a long prompt makes a
# running stream wait. More would lengthen the wait and, measured, not add throughput. A thread's scratch is KiB, and of
# a batch's memory those pages are taken that are written.
CPU = Machine(
    batched_tokens=512,
    workspace_bytes=0,
    arenas=0,
    captures=False,
    takes_all=False,
    copy_rate=5e9,
    compute_rate=2 * 135e6 * 512 / 0.25,
    is_host=True,
)
# cuBLASLt's 32 MiB, the kernels' scratch, 70 MiB at most; it grows by doubling, and what it outgrew stays.
# Rates as measured on an H100 (docs/gpu.md): swap_blocks from 2 MB a piece, and 64 prompts of 4096 with 8B.
CUDA = Machine(
    batched_tokens=8192,
    workspace_bytes=2**28,
    arenas=1,
    captures=True,
    takes_all=True,
    copy_rate=51e9,
    compute_rate=2 * 8e9 * 40_302,
    is_host=False,
)


@dataclass(frozen=True)
class ModelSizes:
    """``max_model_len``: before memory is looked at."""

    spec: ModelSpec
    dtype: FloatName
    cache_dtype: str
    max_model_len: int
    num_parameters: int

    @classmethod
    def of(cls, config: Config, spec: ModelSpec) -> ModelSizes:
        """Raises StartupError (HS-E024) for a context that the model does not have."""
        dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
        count = sum(math.prod(shape) for _, shape in expected_tensors(spec, family_of(spec)))
        cache_dtype = dtype if config.cache.kv_cache_dtype == "auto" else "float8_e4m3fn"
        return cls(spec, dtype, cache_dtype, longest_context(spec, config.model.max_model_len), count)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.item_bytes

    @property
    def rotary_bytes(self) -> int:
        """The table of angles: f32, a row a position."""
        return 4 * self.max_model_len * self.spec.head_dim

    @property
    def token_bytes(self) -> int:
        """Of KV cache."""
        return 2 * self.spec.num_layers * self.spec.num_kv_heads * self.spec.head_dim * ITEM_BYTES[self.cache_dtype]

    def num_host_blocks(self, config: Config) -> int:
        return int(config.cache.swap_space * 2**30) // (config.cache.block_size * self.token_bytes)

    def swap_cost(self, config: Config, machine: Machine) -> int:
        """Tokens that are computed in the time that a block takes to the host and back; attention left out, which
        makes the later tokens of long requests dearer."""
        seconds = 2 * config.cache.block_size * self.token_bytes / machine.copy_rate
        return math.ceil(seconds * machine.compute_rate / (2 * self.num_parameters))

    def activation_bytes(self, tokens: int, rows: int) -> int:
        """Intermediate results of a step: ``tokens`` through a layer, ``rows`` of them to logits."""
        spec, item = self.spec, self.item_bytes
        heads, kv_heads, inner = (
            spec.num_heads * spec.head_dim,
            spec.num_kv_heads * spec.head_dim,
            spec.intermediate_size,
        )
        # Embedding, norm and both outputs; q, k, v; attention's result; gate, up and their product; the f32
        # residual, twice.
        per_token = item * (4 * spec.hidden_size + 2 * heads + 2 * kv_heads + 3 * inner) + 8 * spec.hidden_size
        per_row = 4 * spec.vocab_size + (2 * item + 4) * spec.hidden_size
        return tokens * per_token + rows * per_row


@dataclass(frozen=True)
class StepLimits:
    """The largest step, and the largest that is captured (0: none is)."""

    max_num_seqs: int
    max_batched_tokens: int
    max_captured_tokens: int

    @property
    def pad_sizes(self) -> PadSizes:
        return pad_sizes(self.max_num_seqs, self.max_captured_tokens) if self.max_captured_tokens else PadSizes()

    @property
    def largest_captured(self) -> int:
        return min(self.max_captured_tokens, MIXED_TOKEN_SIZES[-1])

    def rows(self, model: ModelSizes, machine: Machine, block_size: int) -> tuple[tuple[str, int], ...]:
        """What takes how many bytes, for people."""
        tokens, seqs, spec = self.max_batched_tokens, self.max_num_seqs, model.spec
        found = [
            (f"a step of {tokens} tokens, {seqs} rows of logits", model.activation_bytes(tokens, seqs)),
            ("workspaces of libraries and kernels", machine.workspace_bytes),
        ]
        if captured := self.largest_captured:
            kernels = self.pad_sizes.num_shapes * (KERNELS_PER_LAYER * spec.num_layers + 8)
            text = f"graphs, {self.pad_sizes.num_shapes} of up to {captured} tokens"
            # They have memory of their own for intermediate results, one for all, as they run one at a time.
            found.append((text, model.activation_bytes(captured, seqs) + kernels * GRAPH_NODE_BYTES))
        if machine.arenas:
            blocks = seqs * -(-model.max_model_len // block_size)
            batch = 4 * blocks + 20 * tokens + 60 * seqs + 12 * 4 * spec.vocab_size
            found.append(("batches", machine.arenas * batch))
        return tuple(row for row in found if row[1])

    def num_bytes(self, model: ModelSizes, machine: Machine, block_size: int) -> int:
        return sum(num_bytes for _, num_bytes in self.rows(model, machine, block_size))


def longest_context(spec: ModelSpec, requested: int) -> int:
    """Tokens of prompt and reply. Raises StartupError (HS-E024) if ``requested`` is more than the model can do."""
    limit, reason = spec.max_position, "its positions end there"
    if spec.rope.kind == "yarn":
        limit = max(limit, int(spec.rope.original_max_position * spec.rope.factor))
    if 0 < spec.sliding_window < limit:
        # Up to the window's length, windowed attention is full attention, which is the one implemented.
        limit, reason = spec.sliding_window, "its sliding window of attention is not implemented beyond that"
    if requested > limit:
        raise StartupError(
            "HS-E024",
            f"--max-model-len {requested} is more than the model can do",
            f"this model takes up to {limit} tokens: {reason}",
            f"--max-model-len {limit}, or leave it out",
        )
    return requested or limit
