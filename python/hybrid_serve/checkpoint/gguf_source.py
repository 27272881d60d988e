"""GgufSource: a GGUF file's tensors under the names and in the order of a Hugging Face checkpoint; a TensorSource.

``read`` dequantises. ``quantised`` gives the stored bytes, for a kernel that computes on them.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from .dequantize import READABLE_TYPES, dequantize
from .failures import unsupported
from .gguf import GgufFile, GgufTensor
from .model_spec import ModelSpec
from .tensors import Array, FloatName, TensorInfo

_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_TYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def gguf_name(name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor name; None if it has none."""
    if match := _LAYER_NAME.fullmatch(name):
        part = _LAYER.get(match[2])
        return part and f"blk.{match[1]}.{part}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else None


class GgufSource:
    def __init__(self, file: GgufFile, spec: ModelSpec) -> None:
        self.label = file.path.name
        self._file: GgufFile | None = file
        # Files of architecture "llama" hold q and k rows in the interleaved order of ggml's rotary embedding.
        self._heads = {}
        if file.string("general.architecture") in ("llama", "mistral"):
            self._heads = {"self_attn.q_proj": spec.num_heads, "self_attn.k_proj": spec.num_kv_heads}

    def describe(self, name: str) -> TensorInfo | None:
        tensor = self._find(name)
        if tensor is None:
            return None
        if tensor.type not in READABLE_TYPES:
            raise unsupported(
                f"{self.label} has a tensor of type {tensor.type}",
                f"tensor {tensor.name!r}; these can be read: {', '.join(READABLE_TYPES)}",
                "use a variant such as Q4_K_M or Q8_0",
            )
        return TensorInfo(tensor.shape, _TYPE_NAMES.get(tensor.type, tensor.type), tensor.num_bytes)

    def read(self, name: str, dtype: FloatName) -> Array:
        tensor = self._get(name)
        assert self._file is not None
        values = dequantize(self._file.bytes_of(tensor), tensor.type, dtype).reshape(tensor.shape)
        match = _LAYER_NAME.fullmatch(name)
        heads = self._heads.get(match[2]) if match else None
        return values if heads is None else halves_of_pairs(values, heads)

    def quantised(self, name: str) -> tuple[str, NDArray[np.uint8]]:
        """(type, the stored bytes), in the file's row order. Raises KeyError."""
        tensor = self._get(name)
        assert self._file is not None
        return tensor.type, self._file.bytes_of(tensor)

    def close(self) -> None:
        self._file = None

    def _find(self, name: str) -> GgufTensor | None:
        if self._file is None:
            raise ValueError(f"{self.label} is closed")
        return self._file.tensors.get(gguf_name(name) or "")

    def _get(self, name: str) -> GgufTensor:
        tensor = self._find(name)
        if tensor is None:
            raise KeyError(name)
        return tensor


def halves_of_pairs(values: Array, heads: int) -> Array:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...) back to (0, 1, ..., d - 1). values: [heads * d, ...]."""
    rows = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
