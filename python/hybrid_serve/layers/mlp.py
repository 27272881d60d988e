"""GatedMlp: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import ops
from .linear import Linear


class MlpScratch(NamedTuple):
    """Memory that every layer of a step writes its intermediate results to."""

    gate_up: Tensor  # T [rows, 2 * inner]
    product: Tensor  # T [rows, inner]
    out: Tensor  # T [rows, hidden]


class GatedMlp:
    def __init__(self, gate_up: Linear, down: Linear) -> None:
        """``gate_up`` yields both projections side by side."""
        self.gate_up, self.down = gate_up, down

    def scratch(self, x: Tensor) -> MlpScratch:
        """For inputs of the shape of ``x``."""
        rows = x.shape[0]
        return MlpScratch(
            x.new_empty((rows, self.gate_up.weight.n)), x.new_empty((rows, self.down.weight.k)), x.new_empty(x.shape)
        )

    def __call__(self, x: Tensor, scratch: MlpScratch) -> Tensor:
        """x: T [rows, hidden] -> ``scratch.out``."""
        product = ops.linear_silu_mul(x, self.gate_up.weight, self.gate_up.bias, scratch.gate_up, scratch.product)
        return self.down(product, scratch.out)
