"""ModelRunner: one step of the model on one device. Knows batches as columns; not requests, not the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import Buffer

from .. import ops
from ..checkpoint.checkpoint import open_checkpoint
from ..checkpoint.hub import ResolvedModel
from ..config import Config
from ..layers.batch import BatchView, Prefixes
from ..models import family_of
from ..models.decoder import Decoder, build_decoder
from ..models.weights import DTYPES, DummyWeights, WeightReader, Weights, check_tensors
from . import memory
from .arena import NUM_DECODES, NUM_PREFIXES, Batch, Layout
from .device import Device, Steps, open_device
from .limits import MemoryPlan, check_swap_space, plan_memory
from .pad_sizes import PadSizes
from .sampler import sample
from .sizes import ModelSizes
from .step import Columns, Pending, Sampled, StepResult, StepShape

NOT_PADDED = PadSizes()
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
    min_shared_tokens: int  # from where on reading beginnings that decodes share only once pays; 0: never


class ModelRunner:
    """``load``, then ``plan_memory`` and ``allocate``, then ``bind``; from then on ``submit``."""

    def __init__(self, config: Config, sizes: ModelSizes, device: Device, decoder: Decoder, facts: ModelFacts) -> None:
        self.config, self.spec, self.device, self.decoder, self.facts = config, sizes.spec, device, decoder, facts
        self._sizes = sizes
        self._steps: Steps
        self._cache = self._host_cache = torch.empty(0)
        self._picked = torch.empty(0)  # tokens of the last step, for the next one to refer to

    @staticmethod
    def load(config: Config, resolved: ResolvedModel, report: Report) -> ModelRunner:
        """Checks all headers, then loads. Raises StartupError for a model that is corrupt, unknown, or does not fit."""
        device = open_device(config)
        is_dummy = config.model.load_format == "dummy"
        checkpoint = open_checkpoint(resolved, with_tensors=not is_dummy)
        spec, family = checkpoint.spec, family_of(checkpoint.spec)
        sizes = ModelSizes.of(config, spec)
        dtype = DTYPES[sizes.dtype]
        device.check_heads(spec.head_dim, dtype)
        if checkpoint.source is not None:
            check_tensors(spec, family, checkpoint.source)
        plan(config, sizes, device, device.free_bytes())  # what cannot run is told before it is loaded
        weights: Weights = DummyWeights(config.model.seed, device.torch_device)
        if checkpoint.source is not None:
            weights = WeightReader(checkpoint.source, sizes.dtype, device.torch_device, device.write)
        decoder = build_decoder(
            spec, weights, dtype, sizes.max_model_len, lambda share: report("loading_weights", share)
        )
        if checkpoint.source is not None:
            checkpoint.source.close()
        facts = ModelFacts(
            vocab_size=spec.vocab_size,
            max_model_len=sizes.max_model_len,
            eos_token_ids=spec.eos_token_ids,
            dtype=sizes.dtype if sizes.cache_dtype == sizes.dtype else f"{sizes.dtype}, cache {sizes.cache_dtype}",
            device=device.describe(),
            block_bytes=config.cache.block_size * sizes.token_bytes,
            weight_bytes=sizes.weight_bytes,
            min_shared_tokens=device.min_shared_tokens(sizes.token_bytes // spec.num_layers),
        )
        return ModelRunner(config, sizes, device, decoder, facts)

    def plan_memory(self) -> MemoryPlan:
        """What of the memory goes where, now that the model is in it. Raises StartupError (HS-E026, exit code 12)."""
        sizes = self._sizes
        return plan(self.config, sizes, self.device, self.device.free_bytes() + sizes.weight_bytes + sizes.rotary_bytes)

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        """The KV cache: one piece, [block][layer][K|V][kv_head][token][dim], a block's bytes side by side; and as many
        such blocks as preempted requests may leave on the host."""
        spec = self.spec
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, self.config.cache.block_size, spec.head_dim)
        # Not initialised; on a CPU the system provides pages as they are first written.
        cache = torch.empty(shape, dtype=DTYPES[self._sizes.cache_dtype], device=self.device.torch_device)
        self.decoder.bind_cache(cache)
        self._cache = cache.view(num_blocks, -1)
        self._host_cache = self.device.host_memory((num_host_blocks, self._cache.shape[1]), cache.dtype)

    def bind(self, arenas: Sequence[Buffer], layout: Layout, pad_sizes: PadSizes = NOT_PADDED) -> None:
        """``arenas``: the buffers that the scheduler writes batches to; ``layout``: where their columns are;
        ``pad_sizes``: what it pads them to."""
        rows = layout["sample_rows"][2]
        self._picked = torch.zeros(rows, dtype=torch.int32, device=self.device.torch_device)
        self._steps = self.device.steps(arenas, layout, pad_sizes)

    @torch.inference_mode()
    def submit(self, batch: Batch) -> Pending:
        """Starts one batch. Negative token ids, -(row + 1), stand for what row ``row`` of the previous step sampled."""
        return self._steps.submit(batch, self._compute, self._swap)

    def preparation(self) -> Callable[[], None] | None:
        """A piece of work that makes later steps faster, for when none is under way; None: there is none."""
        return self._steps.preparation(torch.inference_mode()(self._compute))

    def step(self, batch: Batch) -> StepResult:
        """Runs one batch to its end."""
        return self.submit(batch).result()

    def _swap(self, columns: Columns, batch: Batch) -> None:
        """In the order of the steps: behind what earlier ones wrote, ahead of what this one writes and reads."""
        src, dst, outs = columns["swap_src"], columns["swap_dst"], batch.num_swap_outs
        if outs:
            ops.swap_blocks(self._host_cache, self._cache, dst[:outs], src[:outs])
        if batch.num_swap_ins:
            end = outs + batch.num_swap_ins
            ops.swap_blocks(self._cache, self._host_cache, dst[outs:end], src[outs:end])

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


def plan(config: Config, sizes: ModelSizes, device: Device, free_bytes: int) -> MemoryPlan:
    """``free_bytes``: of the device, with what the model takes. Raises StartupError (HS-E026, exit code 12)."""
    host_bytes = memory.free_bytes()
    check_swap_space(config, device.machine, host_bytes)
    return plan_memory(config, sizes, device.machine, free_bytes, 0 if device.machine.is_host else host_bytes)
