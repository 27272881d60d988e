"""Quantised GGUF blocks to floats; knows the block formats of ggml, nothing of files or models.

A block holds 32 (or, K-quants, 256) consecutive values of a row. Each decoder takes blocks u8 [n, bytes] and returns
f32 [n, values], computed with the same float32 operations in the same order as ggml's reference, hence bit-equal to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tensors import NUMPY_TYPES, PIECE, Array, FloatName, convert, round_to_bfloat16

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_LOW = np.uint8(15)
_FOUR = np.uint8(4)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of every block, as f32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _scaled(quants: NDArray[Any], blocks: Bytes, at: int) -> Floats:
    """quants [n, 32] times the float16 at byte ``at`` of their block."""
    values: Floats = np.multiply(quants, _half(blocks, at), dtype=np.float32)
    return values


def _nibbles(packed: Bytes) -> Bytes:
    """u8 [n, 16] -> [n, 32]: the low halves first, then the high halves."""
    out = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    half = packed.shape[1]
    np.bitwise_and(packed, _LOW, out=out[:, :half])
    np.right_shift(packed, _FOUR, out=out[:, half:])
    return out


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """The 32 high bits at byte ``at``, each as 0 or 16."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")
    return np.left_shift(bits, _FOUR, out=bits)


def _q4_0(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[:, 2:]).view(np.int8)
    values -= np.int8(8)
    return _scaled(values, blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    values = _scaled(_nibbles(blocks[:, 4:]), blocks, 0)
    values += _half(blocks, 2)
    return values


def _q5_0(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[:, 6:])
    values |= _fifth_bits(blocks, 2)
    return _scaled(values.view(np.int8) - np.int8(16), blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    quants = _nibbles(blocks[:, 8:])
    quants |= _fifth_bits(blocks, 4)
    values = _scaled(quants, blocks, 0)
    values += _half(blocks, 2)
    return values


def _q8_0(blocks: Bytes) -> Floats:
    return _scaled(blocks[:, 2:].view(np.int8), blocks, 0)


def _six_bit_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """u8 [n, 12] -> scales and minima, u8 [n, 8] each: 6 bits; the last four keep two bits in the first eight."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    six, two = np.uint8(0x3F), np.uint8(6)
    high = np.uint8(0x30)
    scales = np.concatenate([first & six, (third & _LOW) | ((first >> np.uint8(2)) & high)], axis=1)
    minima = np.concatenate([second & six, (third >> _FOUR) | ((second >> two << _FOUR) & high)], axis=1)
    return scales, minima


def _scaled_k(blocks: Bytes, quants: Bytes) -> Floats:
    """quants u8 [n, 8, 32] with the scales and minima of a Q4_K or Q5_K block."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    factor = _half(blocks, 0) * scales.astype(np.float32)
    offset = _half(blocks, 2) * minima.astype(np.float32)
    values = np.multiply(quants, factor[:, :, None], dtype=np.float32)
    values -= offset[:, :, None]
    return values.reshape(-1, 256)


def _q4_k(blocks: Bytes) -> Floats:
    return _scaled_k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    quants = _nibbles(np.ascontiguousarray(blocks[:, 48:]).reshape(-1, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    quants |= ((blocks[:, None, 16:48] >> shifts) & np.uint8(1)) << _FOUR
    return _scaled_k(blocks, quants)


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(np.ascontiguousarray(blocks[:, :128]).reshape(-1, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)) << _FOUR
    quants = (low | high).view(np.int8) - np.int8(32)
    scales = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    values: Floats = np.multiply(quants.reshape(-1, 16, 16), scales[:, :, None], dtype=np.float32)
    return values.reshape(-1, 256)


# type -> (decoder, values a block, bytes a block)
_DECODERS: dict[str, tuple[Callable[[Bytes], Floats], int, int]] = {
    "q4_0": (_q4_0, 32, 18),
    "q4_1": (_q4_1, 32, 20),
    "q5_0": (_q5_0, 32, 22),
    "q5_1": (_q5_1, 32, 24),
    "q8_0": (_q8_0, 32, 34),
    "q4_k": (_q4_k, 256, 144),
    "q5_k": (_q5_k, 256, 176),
    "q6_k": (_q6_k, 256, 210),
}
_PLAIN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
READABLE_TYPES = (*_PLAIN, *_DECODERS)


def is_quantised(kind: str) -> bool:
    return kind in _DECODERS


def dequantize(data: Bytes, kind: str, dtype: FloatName) -> Array:
    """The values of a tensor's bytes, flat, as ``NUMPY_TYPES[dtype]``; a view of ``data`` where the types are equal.
    Raises ValueError for a type not in READABLE_TYPES."""
    if kind in _PLAIN:
        stored: Any = NUMPY_TYPES[_PLAIN[kind]]
        return convert(data.view(stored), _PLAIN[kind], dtype)
    if kind not in _DECODERS:
        raise ValueError(f"tensor type {kind} cannot be read, only {', '.join(READABLE_TYPES)}")
    decode, values, num_bytes = _DECODERS[kind]
    blocks = data.reshape(-1, num_bytes)
    out: Array = np.empty(blocks.shape[0] * values, NUMPY_TYPES[dtype])
    step = PIECE // values
    for start in range(0, blocks.shape[0], step):
        piece = decode(blocks[start : start + step]).reshape(-1)
        target = out[start * values : start * values + piece.size]
        if dtype == "bfloat16":
            round_to_bfloat16(piece, target)
        else:
            with np.errstate(over="ignore"):
                target[:] = piece
    return out
