"""The table of rotary angles for each way of stretching a context; knows the formulas, not the kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checkpoint.model_spec import RopeSpec


def cos_sin_table(rope: RopeSpec, head_dim: int, max_positions: int) -> Tensor:
    """f32 [max_positions, head_dim]: cosines in the first half of a row, sines in the second."""
    frequencies, scale = inverse_frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    table = torch.empty((max_positions, head_dim), dtype=torch.float32)
    torch.cos(angles, out=table[:, : head_dim // 2])
    torch.sin(angles, out=table[:, head_dim // 2 :])
    return table if scale == 1.0 else table.mul_(scale)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """f32 [head_dim / 2], and the factor on cosines and sines. float32 all the way, as the models were trained."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "factors":
        return plain / torch.tensor(rope.factors, dtype=torch.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim), yarn_attention_factor(rope)
    return plain, 1.0


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended."""
    context = rope.original_max_position
    wavelengths = 2 * math.pi / plain
    share = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * plain / rope.factor + share * plain
    long_waves, short_waves = context / rope.low_freq_factor, context / rope.high_freq_factor
    kept_or_blended = torch.where(wavelengths < short_waves, plain, blended)
    return torch.where(wavelengths > long_waves, plain / rope.factor, kept_or_blended)


def _yarn(rope: RopeSpec, plain: Tensor, head_dim: int) -> Tensor:
    """Dimensions that turn more than beta_fast times in the original context stay, under beta_slow are stretched."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step, not a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
