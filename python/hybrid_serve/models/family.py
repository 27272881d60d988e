"""Family: how a model differs from the plain decoder, as flags; one file per family fills one in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    name: str
    qkv_bias: bool = False
    output_bias: bool = False  # of the projection after attention
    mlp_bias: bool = False
    head_norm: bool = False  # RMS norm of every query and key head
