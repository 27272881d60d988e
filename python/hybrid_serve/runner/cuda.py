"""CudaDevice: one GPU. Knows torch.cuda, pinned memory and the stream that steps run on; no model and no scheduler."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from .. import _kernels
from ..checkpoint.failures import unsupported
from ..checkpoint.tensors import Array
from ..config import Config
from .arena import ArenaViews, Batch, Layout, columns_of
from .graphs import Graphs
from .step import Compute, Sampled, StepResult, exact_shape, padded_shape

STAGING_BYTES = 32 * 2**20  # per loading thread
HEAD_SIZES = (64, 80, 96, 128, 256)  # by_head_dim in cuda/attention.cuh
SPARED_BYTES = 100 * 10**6  # of a layer's KV: what one more kernel costs, see docs/gpu.md
KEPT_FREE_BYTES = 2**29  # for graphs, library workspaces and what the driver takes as it goes


class CudaDevice:
    """Nothing on the host waits for it between two steps: two are under way, and the second one finds the tokens that
    the first one picked in the device's own memory."""

    depth = 2
    default_batched_tokens = 8192

    def __init__(self, config: Config) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._is_invariant = config.engine.batch_invariant
        _kernels.set_batch_invariant(self._is_invariant)
        self.captures = not config.engine.enforce_eager
        self._utilization = config.cache.gpu_memory_utilization
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

    def free_bytes(self) -> int:
        """Within the share of the GPU that may be used (``--gpu-memory-utilization``)."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return max(int(free - total * (1 - self._utilization)), 0)

    def min_shared_tokens(self, token_bytes: int) -> int:
        # Read together, rows would depend on their company.
        return 0 if self._is_invariant else -(-SPARED_BYTES // token_bytes)

    def cache_budget(self, free_bytes: int) -> int | None:
        return max(free_bytes - KEPT_FREE_BYTES, 0)

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

    def steps(self, arenas: Sequence[Buffer], layout: Layout) -> CudaSteps:
        views = [ArenaViews(arena, layout) for arena in arenas]
        return CudaSteps(self, views, layout)


class CudaSteps:
    """Batches to the device in one copy each, results back in another, all on one stream."""

    def __init__(self, device: CudaDevice, views: Sequence[ArenaViews], layout: Layout) -> None:
        self._views = views
        for view in views:
            _pin(view.memory)
        weakref.finalize(self, _unpin, [view.memory for view in views])
        self._memory = torch.zeros(views[0].memory.numel(), dtype=torch.uint8, device=device.torch_device)
        self._columns = columns_of(self._memory, layout)
        self._stream = torch.cuda.Stream(device.torch_device)  # type: ignore[no-untyped-call]
        self._graphs = Graphs() if device.captures else None
        # One row for every arena: when an arena is written again, the results of its last batch have been read.
        self._tokens = torch.empty((len(views), layout["sample_rows"][2]), dtype=torch.int32, pin_memory=True)
        torch.cuda.synchronize(device.torch_device)  # weights and cache were made on another stream

    def submit(self, batch: Batch, compute: Compute) -> CudaPending:
        views = self._views[batch.arena]
        with torch.cuda.stream(self._stream):
            self._memory[: batch.bytes_used].copy_(views.memory[: batch.bytes_used], non_blocking=True)
            if self._graphs is not None and batch.is_padded:
                sampled = self._graphs.run(compute, self._columns, padded_shape(batch, views))
            else:
                sampled = compute(self._columns, exact_shape(batch, views))
            return CudaPending(sampled, batch.num_sampled, self._tokens[batch.arena])


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
