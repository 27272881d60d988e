"""CudaDevice: one GPU. Knows torch.cuda, pinned memory and the stream that steps run on; no model and no scheduler."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from .. import _kernels
from ..checkpoint.failures import unsupported
from ..checkpoint.tensors import Array
from ..config import Config
from . import sizes
from .arena import ArenaViews, Batch, Layout, columns_of, write_nobodys_batch
from .graphs import Graphs, Replay
from .pad_sizes import PadSizes
from .step import (
    Columns,
    Compute,
    Sampled,
    StepResult,
    StepShape,
    Swap,
    exact_shape,
    likely_shapes,
    padded_shape,
)

STAGING_BYTES = 32 * 2**20  # per loading thread
HEAD_SIZES = (64, 80, 96, 128, 256)  # by_head_dim in cuda/attention.cuh
SPARED_BYTES = 100 * 10**6  # of a layer's KV: what one more kernel costs, see docs/gpu.md


class CudaDevice:
    """Nothing on the host waits for it between two steps: two are under way, and the second one finds the tokens that
    the first one picked in the device's own memory."""

    depth = 2

    def __init__(self, config: Config) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._is_invariant = config.engine.batch_invariant
        _kernels.set_batch_invariant(self._is_invariant)
        self.captures = not config.engine.enforce_eager
        self.machine = sizes.CUDA._replace(total_bytes=torch.cuda.get_device_properties(self.torch_device).total_memory)
        self._utilization = config.cache.gpu_memory_utilization
        self._has_fp8_cache = config.cache.kv_cache_dtype != "auto"
        self._local = threading.local()

    def describe(self) -> str:
        properties = torch.cuda.get_device_properties(self.torch_device)
        return f"cuda ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"

    def check_heads(self, head_dim: int, dtype: torch.dtype) -> None:
        if dtype != torch.float32 and head_dim not in HEAD_SIZES:
            sizes = ", ".join(map(str, HEAD_SIZES))
            raise unsupported(
                f"attention heads of size {head_dim} are not supported on this device",
                f"in 16 bits there are CUDA kernels for sizes {sizes}",
                "--dtype float32, or --device cpu",
            )
        if self._has_fp8_cache and head_dim % 16:
            raise unsupported(
                f"attention heads of size {head_dim} cannot have an fp8 cache on this device",
                "its kernels read it 16 bytes at a time",
                "--kv-cache-dtype auto, or --device cpu",
            )

    def free_bytes(self) -> int:
        """Within the share of the GPU that may be used (``--gpu-memory-utilization``)."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free - total * (1 - self._utilization))

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def min_shared_tokens(self, token_bytes: int) -> int:
        # Read together, rows would depend on their company.
        return 0 if self._is_invariant else -(-SPARED_BYTES // token_bytes)

    def write(self, out: Tensor, values: Array) -> None:
        flat, target = values.reshape(-1), out.view(-1)
        staging = self._staging(target.dtype)
        for start in range(0, target.numel(), staging.numel()):
            count = min(staging.numel(), target.numel() - start)
            piece = staging[:count]
            bits = piece.view(torch.uint16) if piece.dtype == torch.bfloat16 else piece
            np.copyto(bits.numpy(), flat[start : start + count])
            target[start : start + count].copy_(piece, non_blocking=True)
            torch.cuda.current_stream().synchronize()

    def _staging(self, dtype: torch.dtype) -> Tensor:
        """Pinned memory of this thread."""
        if not hasattr(self._local, "staging"):
            self._local.staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        memory: Tensor = self._local.staging
        return memory.view(dtype)

    def steps(self, arenas: Sequence[Buffer], layout: Layout, pad_sizes: PadSizes) -> CudaSteps:
        views = [ArenaViews(arena, layout) for arena in arenas]
        return CudaSteps(self, views, layout, pad_sizes)


class CudaSteps:
    """Batches to the device in one copy each, results back in another, all on one stream."""

    def __init__(self, device: CudaDevice, views: Sequence[ArenaViews], layout: Layout, pad_sizes: PadSizes) -> None:
        self._views = views
        for view in views:
            _pin(view.memory)
        weakref.finalize(self, _unpin, [view.memory for view in views])
        self._memory = torch.zeros(views[0].memory.numel(), dtype=torch.uint8, device=device.torch_device)
        self._columns = columns_of(self._memory, layout)
        self._stream = torch.cuda.Stream(device.torch_device)  # type: ignore[no-untyped-call]
        self._graphs = Graphs(Capture(), likely_shapes(pad_sizes, layout)) if device.captures else None
        # One row for every arena: when an arena is written again, the results of its last batch have been read.
        self._tokens = torch.empty((len(views), layout["sample_rows"][2]), dtype=torch.int32, pin_memory=True)
        torch.cuda.synchronize(device.torch_device)  # weights and cache were made on another stream

    def submit(self, batch: Batch, compute: Compute, swap: Swap) -> CudaPending:
        views = self._views[batch.arena]
        with torch.cuda.stream(self._stream):
            if batch.num_swap_outs or batch.num_swap_ins:
                swap(views.tensors, batch)
            self._memory[: batch.bytes_used].copy_(views.memory[: batch.bytes_used], non_blocking=True)
            if self._graphs is not None and batch.is_padded:
                sampled = self._graphs.run(compute, self._columns, padded_shape(batch, views))
            else:
                sampled = compute(self._columns, exact_shape(batch, views))
            return CudaPending(sampled, batch.num_sampled, self._tokens[batch.arena])

    def preparation(self, compute: Compute) -> Callable[[], None] | None:
        shape = self._graphs.next_ahead() if self._graphs is not None else None
        return None if shape is None else lambda: self._capture_ahead(compute, shape)

    def _capture_ahead(self, compute: Compute, shape: StepShape) -> None:
        assert self._graphs is not None
        with torch.cuda.stream(self._stream):
            write_nobodys_batch(self._columns, is_decode=shape.max_prompts == 0)
            self._graphs.record_ahead(compute, self._columns, shape)
            self._stream.synchronize()  # a request that comes now waits for this one piece


class Capture:
    """Records a step as a CUDA graph."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # one memory for all: they run one at a time

    def __call__(self, compute: Compute, columns: Columns, shape: StepShape) -> tuple[Replay, Sampled]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            sampled = compute(columns, shape)
        finally:
            graph.capture_end()
        return graph.replay, sampled


class CudaPending:
    """A step's results on their way to pinned memory."""

    def __init__(self, sampled: Sampled, rows: int, tokens: Tensor) -> None:
        """``tokens``: where to put them, pinned."""
        self._host = [tokens[:rows].copy_(sampled.tokens[:rows], non_blocking=True)]
        for column in sampled[1:]:
            if column is not None:
                host = torch.empty((rows, *column.shape[1:]), dtype=column.dtype, pin_memory=True)
                self._host.append(host.copy_(column[:rows], non_blocking=True))
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def result(self) -> StepResult:
        self._event.synchronize()
        return StepResult(*(column.numpy() for column in self._host))


def _pin(memory: Tensor) -> None:
    """Locks ordinary memory, so that the device reads it directly."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[no-untyped-call]
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.numel()} bytes failed with error {int(code)}")


def _unpin(memories: Sequence[Tensor]) -> None:
    torch.cuda.synchronize()
    for memory in memories:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
