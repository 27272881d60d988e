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
from ..layers.batch import BatchView
from ..models import family_of
from ..models.decoder import Decoder, build_decoder
from ..models.weights import DTYPES, DummyWeights, WeightReader, Weights, check_tensors, weight_bytes
from .arena import NUM_DECODES, ArenaViews, Batch, Layout
from .device import CpuDevice, open_device
from .limits import CachePlan, check_weights_fit, longest_context, plan_cache
from .sampler import StepResult, sample

Report = Callable[[str, float], None]  # phase, share done


@dataclass(frozen=True)
class ModelFacts:
    """What the model and its files say. ``max_model_len``: before memory is looked at (see ``plan_blocks``)."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    block_bytes: int  # of one KV block, all layers
    weight_bytes: int


class ModelRunner:
    """``load``, then ``plan_blocks`` and ``allocate``, then ``bind``; from then on ``step``."""

    def __init__(self, config: Config, spec: ModelSpec, device: CpuDevice, decoder: Decoder, facts: ModelFacts) -> None:
        self.config, self.spec, self.device, self.decoder, self.facts = config, spec, device, decoder, facts
        self._cache = torch.empty(0)
        self._views: list[ArenaViews] = []
        self._last_tokens = torch.empty(0, dtype=torch.int32)

    @staticmethod
    def load(config: Config, resolved: ResolvedModel, report: Report) -> ModelRunner:
        """Checks all headers, then loads. Raises StartupError for a model that is corrupt, unknown, or does not fit."""
        device = open_device(config.engine)
        is_dummy = config.model.load_format == "dummy"
        checkpoint = open_checkpoint(resolved, with_tensors=not is_dummy)
        spec, family = checkpoint.spec, family_of(checkpoint.spec)
        max_model_len = longest_context(spec, config.model.max_model_len)
        dtype_name = spec.dtype if config.model.dtype == "auto" else config.model.dtype
        dtype = DTYPES[dtype_name]
        if checkpoint.source is not None:
            check_tensors(spec, family, checkpoint.source)
        num_bytes = weight_bytes(spec, family, dtype)
        check_weights_fit(num_bytes, device.free_bytes())
        weights: Weights = DummyWeights(config.model.seed)
        if checkpoint.source is not None:
            weights = WeightReader(checkpoint.source, dtype_name)
        decoder = build_decoder(spec, weights, dtype, max_model_len, lambda share: report("loading_weights", share))
        if checkpoint.source is not None:
            checkpoint.source.close()
        token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize
        facts = ModelFacts(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=spec.eos_token_ids,
            dtype=dtype_name,
            device=device.describe(),
            block_bytes=config.cache.block_size * token_bytes,
            weight_bytes=num_bytes,
        )
        return ModelRunner(config, spec, device, decoder, facts)

    def plan_blocks(self) -> CachePlan:
        """Number of KV blocks and the longest context they allow. Raises StartupError (HS-E026, exit code 12)."""
        return plan_cache(
            self.config.cache,
            block_bytes=self.facts.block_bytes,
            max_model_len=self.facts.max_model_len,
            is_length_fixed=self.config.model.max_model_len > 0,
            max_num_seqs=self.config.scheduler.max_num_seqs,
            free_bytes=self.device.free_bytes(),
        )

    def allocate(self, num_blocks: int) -> None:
        """The KV cache: one piece, [block][layer][K|V][kv_head][token][dim], a block's bytes side by side."""
        spec = self.spec
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, self.config.cache.block_size, spec.head_dim)
        cache = self.device.empty(shape, DTYPES[self.facts.dtype])
        self.decoder.bind_cache(cache)
        self._cache = cache.view(num_blocks, -1)

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        """``arenas``: the buffers that the scheduler writes batches to; ``layout``: where their columns are."""
        self._views = [ArenaViews(arena, layout) for arena in arenas]

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepResult:
        """Runs one batch. Negative token ids, -(row + 1), stand for what row ``row`` of the previous step sampled."""
        views = self._views[batch.arena]
        columns, num_seqs = views.tensors, batch.num_seqs
        if batch.num_copies:
            ops.copy_blocks(
                self._cache, columns["copy_src"][: batch.num_copies], columns["copy_dst"][: batch.num_copies]
            )
        num_blocks = int(views.arrays["kv_start"][num_seqs])
        view = BatchView(
            token_ids=columns["token_ids"][: batch.num_tokens],
            picked=self._last_tokens,
            positions=columns["positions"][: batch.num_tokens],
            slots=columns["slots"][: batch.num_tokens],
            query_start=columns["query_start"][: num_seqs + 1],
            seq_lens=columns["seq_lens"][:num_seqs],
            kv_start=columns["kv_start"][: num_seqs + 1],
            kv_blocks=columns["kv_blocks"][:num_blocks],
            sample_rows=columns["sample_rows"][: batch.num_sampled],
            num_decodes=columns["header"][NUM_DECODES : NUM_DECODES + 1],
            max_decodes=batch.num_decodes,
            max_prompts=num_seqs - batch.num_decodes,
            max_query_len=batch.max_query_len,
        )
        logits = self.decoder(view.with_plan(self.spec.num_heads, self.spec.num_kv_heads))
        self._last_tokens, result = sample(logits, views, batch)
        return result
