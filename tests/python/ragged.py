"""Hand-made batches: logits of a decoder for ragged sequences, without scheduler and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_serve.layers.batch import BatchView
from hybrid_serve.runner.model_runner import ModelRunner


@dataclass
class CachedSequence:
    """A sequence in the cache: its tokens and how many of them are computed."""

    tokens: list[int]
    blocks: list[int]
    num_computed: int = 0


class Ragged:
    """Gives each sequence its own blocks, in an order that is not ascending."""

    def __init__(self, runner: ModelRunner, num_blocks: int = 128, has_decodes: bool = True) -> None:
        """``has_decodes``: single rows count as decodes; else all rows are pieces of prompts."""
        self.has_decodes = has_decodes
        self.runner, self.block_size = runner, runner.config.cache.block_size
        runner.allocate(num_blocks)
        self.free = [(index * 37 + 5) % num_blocks for index in range(num_blocks)]  # 37 and num_blocks: coprime

    def open(self, tokens: Sequence[int]) -> CachedSequence:
        count = -(-len(tokens) // self.block_size)
        blocks, self.free = self.free[:count], self.free[count:]
        return CachedSequence(list(tokens), blocks)

    def logits(self, work: Sequence[tuple[CachedSequence, int]]) -> list[Tensor]:
        """Computes the next ``count`` tokens of each sequence in one batch; logits of all rows, [count, vocab] each."""
        # As the scheduler does: decodes first. Results come back in the order of ``work``.
        order = sorted(range(len(work)), key=lambda index: work[index][1] != 1)
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        blocks: list[int] = []
        query_start, kv_start, seq_lens = [0], [0], []
        for index in order:
            sequence, count = work[index]
            for position in range(sequence.num_computed, sequence.num_computed + count):
                ids.append(sequence.tokens[position])
                positions.append(position)
                block = sequence.blocks[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            sequence.num_computed += count
            blocks += sequence.blocks[: -(-sequence.num_computed // self.block_size)]
            query_start.append(len(ids))
            kv_start.append(len(blocks))
            seq_lens.append(sequence.num_computed)

        def column(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.runner.device.torch_device)

        counts = [work[index][1] for index in order]
        decodes = counts.count(1) if self.has_decodes else 0
        batch = BatchView(
            token_ids=column(ids),
            picked=column([]),
            positions=column(positions),
            slots=column(slots, torch.int64),
            query_start=column(query_start),
            seq_lens=column(seq_lens),
            kv_start=column(kv_start),
            kv_blocks=column(blocks),
            sample_rows=None,
            num_decodes=column([decodes], torch.int64),
            max_decodes=decodes,
            max_prompts=len(counts) - decodes,
            max_query_len=max(counts),
        )
        rows = torch.split(self.runner.decoder(batch), counts)
        return [rows[order.index(index)] for index in range(len(work))]
