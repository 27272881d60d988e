"""Dequantisation against the reference implementation in the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from hybrid_serve.checkpoint.dequantize import _DECODERS, READABLE_TYPES, dequantize, is_quantised
from hybrid_serve.checkpoint.tensors import PIECE, convert


def random_blocks(kind: str, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Blocks of random bits. Scales are float16 of any value, infinities and NaN among them."""
    return np.random.default_rng(len(kind)).integers(0, 256, (count, _DECODERS[kind][2]), dtype=np.uint8)


@pytest.mark.parametrize("kind", _DECODERS)
def test_every_quantised_type_is_bit_equal_to_the_reference(kind: str) -> None:
    values = _DECODERS[kind][1]
    blocks = random_blocks(kind, PIECE // values * 2 + 3)  # more than one piece, and a rest
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()]).reshape(-1)
        found = dequantize(blocks.reshape(-1), kind, "float32")
    assert is_quantised(kind)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_plain_types_keep_their_values(kind: str) -> None:
    values = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind.upper()]
    stored = gguf.quants.quantize(values, number)
    found = dequantize(stored.view(np.uint8).reshape(-1), kind, "float32")
    np.testing.assert_array_equal(found, gguf.quants.dequantize(stored, number).reshape(-1))


def test_readable_types_are_those_that_the_documentation_lists() -> None:
    assert set(READABLE_TYPES) == {
        "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k",
    }  # fmt: skip


def test_an_unreadable_type_is_a_value_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="iq2_xs"):
        dequantize(np.zeros(74, np.uint8), "iq2_xs", "float32")


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_conversion_between_float_types_rounds_as_torch_does(source: str, target: str) -> None:
    edges = [0.0, -0.0, 1e-8, -1e-8, 65504.0, 65520.0, 1e30, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8]
    values = torch.cat([torch.tensor(edges), torch.randn(70000, generator=torch.Generator().manual_seed(0))])
    start = values.to(getattr(torch, source))
    bits = start.view(torch.uint16) if source == "bfloat16" else start
    found = torch.from_numpy(convert(bits.numpy(), source, target).copy())  # type: ignore[arg-type]
    if target == "bfloat16":
        found = found.view(torch.bfloat16)
    torch.testing.assert_close(found, start.to(getattr(torch, target)), rtol=0, atol=0, equal_nan=True)
