"""One function per op of cpp/ops/ops.h, arguments in the order of the struct's fields. Tensors cross by DLPack
(the 1.3 C exchange table of torch, else ``__dlpack__``): no copy, no libtorch. Bad arguments raise ValueError."""

from typing import Any

def has_cuda() -> bool: ...  # whether the CUDA kernels were compiled
def cuda_architectures() -> str: ...  # that they were compiled for, as CMake has them: "80-real 90a-real"; or nothing
def isa() -> str: ...  # of the CPU kernels: baseline, avx2, avx512, avx512_bf16, amx
def set_num_threads(n: int) -> None: ...  # 0: one per usable core
def num_threads() -> int: ...
def set_batch_invariant(on: bool) -> None: ...  # of the process: a row's bits never depend on its batch
def packed_size(n: int, k: int) -> int: ...
def pack_weight(out: Any, weight: Any) -> None: ...
def embedding(out: Any, ids: Any, table: Any, picked: Any | None, vocab: int) -> None: ...
def linear(out: Any, x: Any, weight: Any, bias: Any | None, n: int, k: int) -> None: ...
def linear_silu_mul(out: Any, x: Any, weight: Any, bias: Any | None, gate_up: Any, k: int) -> None: ...
def rms_norm(out: Any, x: Any, weight: Any, residual: Any | None, eps: float, begins_residual: bool) -> None: ...
def norm_linear(
    out: Any,
    x: Any,
    weight: Any,
    residual: Any,
    sum: Any,
    normed: Any,
    product_weight: Any,
    bias: Any | None,
    gate_up: Any | None,
    n: int,
    k: int,
    eps: float,
    begins_residual: bool,
) -> None: ...
def silu_mul(out: Any, x: Any) -> None: ...
def rotate_and_store(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    cos_sin: Any,
    positions: Any,
    slots: Any,
    q_weight: Any | None,
    k_weight: Any | None,
    eps: float,
    k_scale: float,
    v_scale: float,
) -> None: ...
def decode_plan_size(max_decodes: int) -> int: ...
def plan_decode(
    plan: Any,
    query_start: Any,
    seq_lens: Any,
    kv_start: Any,
    num_decodes: Any,
    max_decodes: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    prefix_start: Any | None,
    prefix_lens: Any | None,
    num_prefixes: Any | None,
    block_size: int,
) -> None: ...
def paged_attention(
    out: Any,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    query_start: Any,
    seq_lens: Any,
    kv_start: Any,
    kv_blocks: Any,
    num_decodes: Any | None,
    max_decodes: int,
    max_prompts: int,
    max_query_len: int,
    scale: float,
    plan: Any | None,
    shares_prefixes: bool,
    k_scale: float,
    v_scale: float,
) -> None: ...
def copy_blocks(cache: Any, src: Any, dst: Any) -> None: ...
def swap_blocks(dst_cache: Any, src_cache: Any, dst: Any, src: Any) -> None: ...
def sample(
    tokens: Any,
    logprobs: Any | None,
    logprob_ids: Any | None,
    ranks: Any | None,
    logits: Any,
    temperature: Any,
    top_p: Any,
    min_p: Any,
    repetition_penalty: Any,
    top_k: Any,
    seeds: Any,
    positions: Any,
    num_logprobs: Any,
    adjust_start: Any,
    adjust_ids: Any,
    adjust_add: Any,
    adjust_flags: Any,
) -> None: ...
