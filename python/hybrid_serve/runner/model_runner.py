"""ModelRunner: one step of the model on one device. Knows batches as columns; not requests, not the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import Buffer

from .. import ops
from ..checkpoint.checkpoint import open_checkpoint
from ..checkpoint.hub import ResolvedModel
from ..checkpoint.model_spec import ModelSpec
from ..config import Config
from ..layers.batch import BatchView, Prefixes
from ..models import family_of
from ..models.decoder import Decoder, build_decoder
from ..models.weights import DTYPES, DummyWeights, WeightReader, Weights, check_tensors, weight_bytes
from .arena import NUM_DECODES, NUM_PREFIXES, Batch, Layout
from .device import Device, Steps, open_device
from .graphs import PadSizes, pad_sizes
from .limits import MemoryPlan, activation_bytes, check_weights_fit, longest_context, plan_memory
from .sampler import sample
from .step import Columns, Pending, Sampled, StepResult, StepShape

Report = Callable[[str, float], None]  # phase, share done


@dataclass(frozen=True)
class ModelFacts:
    """What the model and its files say. ``max_model_len``: before memory is looked at (see ``plan_memory``)."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    block_bytes: int  # of one KV block, all layers
    weight_bytes: int
    max_batched_tokens: int
    pad_sizes: PadSizes
    min_shared_tokens: int  # from where on reading beginnings that decodes share only once pays; 0: never


class ModelRunner:
    """``load``, then ``plan_memory`` and ``allocate``, then ``bind``; from then on ``submit``."""

    def __init__(self, config: Config, spec: ModelSpec, device: Device, decoder: Decoder, facts: ModelFacts) -> None:
        self.config, self.spec, self.device, self.decoder, self.facts = config, spec, device, decoder, facts
        self._steps: Steps
        self._cache = torch.empty(0)
        self._picked = torch.empty(0)  # tokens of the last step, for the next one to refer to

    @staticmethod
    def load(config: Config, resolved: ResolvedModel, report: Report) -> ModelRunner:
        """Checks all headers, then loads. Raises StartupError for a model that is corrupt, unknown, or does not fit."""
        device = open_device(config)
        is_dummy = config.model.load_format == "dummy"
        checkpoint = open_checkpoint(resolved, with_tensors=not is_dummy)
        spec, family = checkpoint.spec, family_of(checkpoint.spec)
        max_model_len = longest_context(spec, config.model.max_model_len)
        dtype_name = spec.dtype if config.model.dtype == "auto" else config.model.dtype
        dtype = DTYPES[dtype_name]
        device.check_heads(spec.head_dim, dtype)
        if checkpoint.source is not None:
            check_tensors(spec, family, checkpoint.source)
        num_bytes = weight_bytes(spec, family, dtype)
        check_weights_fit(num_bytes, device.free_bytes())
        weights: Weights = DummyWeights(config.model.seed, device.torch_device)
        if checkpoint.source is not None:
            weights = WeightReader(checkpoint.source, dtype_name, device.torch_device, device.write)
        decoder = build_decoder(spec, weights, dtype, max_model_len, lambda share: report("loading_weights", share))
        if checkpoint.source is not None:
            checkpoint.source.close()
        token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize
        scheduler = config.scheduler
        tokens = scheduler.max_num_batched_tokens or max(device.default_batched_tokens, scheduler.max_num_seqs)
        facts = ModelFacts(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=spec.eos_token_ids,
            dtype=dtype_name,
            device=device.describe(),
            block_bytes=config.cache.block_size * token_bytes,
            weight_bytes=num_bytes,
            max_batched_tokens=tokens,
            pad_sizes=pad_sizes(scheduler.max_num_seqs, tokens) if device.captures else PadSizes(),
            min_shared_tokens=device.min_shared_tokens(token_bytes // spec.num_layers),
        )
        return ModelRunner(config, spec, device, decoder, facts)

    def plan_memory(self) -> MemoryPlan:
        """Number of KV blocks and the longest context they allow. Raises StartupError (HS-E026, exit code 12)."""
        facts, max_num_seqs = self.facts, self.config.scheduler.max_num_seqs
        activations = activation_bytes(self.spec, DTYPES[facts.dtype].itemsize, facts.max_batched_tokens, max_num_seqs)
        captured = max(facts.pad_sizes.mixed_tokens, default=0)
        if captured:
            activations += activation_bytes(self.spec, DTYPES[facts.dtype].itemsize, captured, max_num_seqs)
        free_bytes = self.device.free_bytes()
        return plan_memory(
            self.config.cache,
            weight_bytes=facts.weight_bytes,
            activation_bytes=activations,
            block_bytes=facts.block_bytes,
            max_model_len=facts.max_model_len,
            is_length_fixed=self.config.model.max_model_len > 0,
            max_num_seqs=max_num_seqs,
            free_bytes=free_bytes - activations,
            cache_budget=self.device.cache_budget(free_bytes - activations),
        )

    def allocate(self, num_blocks: int) -> None:
        """The KV cache: one piece, [block][layer][K|V][kv_head][token][dim], a block's bytes side by side."""
        spec = self.spec
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, self.config.cache.block_size, spec.head_dim)
        # Not initialised; on a CPU the system provides pages as they are first written.
        cache = torch.empty(shape, dtype=DTYPES[self.facts.dtype], device=self.device.torch_device)
        self.decoder.bind_cache(cache)
        self._cache = cache.view(num_blocks, -1)

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        """``arenas``: the buffers that the scheduler writes batches to; ``layout``: where their columns are."""
        rows = layout["sample_rows"][2]
        self._picked = torch.zeros(rows, dtype=torch.int32, device=self.device.torch_device)
        self._steps = self.device.steps(arenas, layout)

    @torch.inference_mode()
    def submit(self, batch: Batch) -> Pending:
        """Starts one batch. Negative token ids, -(row + 1), stand for what row ``row`` of the previous step sampled."""
        return self._steps.submit(batch, self._compute)

    def step(self, batch: Batch) -> StepResult:
        """Runs one batch to its end."""
        return self.submit(batch).result()

    def _compute(self, columns: Columns, shape: StepShape) -> Sampled:
        tokens, seqs, copies = shape.num_tokens, shape.num_seqs, shape.num_copies
        if copies:
            ops.copy_blocks(self._cache, columns["copy_src"][:copies], columns["copy_dst"][:copies])
        logits = self.decoder(
            BatchView(
                token_ids=columns["token_ids"][:tokens],
                picked=self._picked,
                positions=columns["positions"][:tokens],
                slots=columns["slots"][:tokens],
                query_start=columns["query_start"][: seqs + 1],
                seq_lens=columns["seq_lens"][:seqs],
                kv_start=columns["kv_start"][: seqs + 1],
                kv_blocks=columns["kv_blocks"][: shape.num_blocks],
                # A decode picks a token, and decodes are in order; of a padded prompt's rows only some do.
                sample_rows=columns["sample_rows"][: shape.num_sampled] if shape.max_prompts else None,
                num_decodes=columns["header"][NUM_DECODES : NUM_DECODES + 1],
                max_decodes=shape.max_decodes,
                max_prompts=shape.max_prompts,
                max_query_len=shape.max_query_len,
                prefixes=Prefixes(
                    columns["prefix_start"],
                    columns["prefix_lens"],
                    columns["header"][NUM_PREFIXES : NUM_PREFIXES + 1],
                    self.config.cache.block_size,
                )
                if shape.shares_prefixes
                else None,
            ).with_plan(self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim)
        )
        return sample(logits, columns, shape, self._picked[: shape.num_sampled])
