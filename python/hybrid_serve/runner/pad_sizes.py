"""Which sizes batches are padded to, so that they are of few shapes; knows no torch and no graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Sizes = tuple[int, ...]


class PadSizes(NamedTuple):
    """What the core pads batches to; empty: it does not."""

    decodes: Sizes = ()
    mixed_seqs: Sizes = ()
    mixed_tokens: Sizes = ()

    @property
    def num_shapes(self) -> int:
        return len(self.decodes) + len(self.mixed_seqs) * len(self.mixed_tokens)


DECODE_SIZES: Sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, 513, 32), 640, 768, 896, 1024)
MIXED_SEQ_SIZES: Sizes = (4, 16, 64, 256, 1024)
# Padding costs a large model a few percent of a step; every size costs its capture once.
MIXED_TOKEN_SIZES: Sizes = (*range(16, 129, 16), *range(160, 513, 32), *range(576, 1025, 64), *range(1152, 2049, 128))


def pad_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> PadSizes:
    return PadSizes(
        _up_to(DECODE_SIZES, min(max_num_seqs, max_num_batched_tokens)),
        _up_to(MIXED_SEQ_SIZES, max_num_seqs),
        _up_to(MIXED_TOKEN_SIZES, max_num_batched_tokens),
    )


def _up_to(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    """Those below ``limit``, and then ``limit`` itself, if it is not beyond the largest."""
    return (*(size for size in sizes if size < limit), *([limit] if limit <= sizes[-1] else []))
