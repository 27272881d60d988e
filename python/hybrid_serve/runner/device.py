"""The device as an object: what the runner asks of the machine, so that nothing else asks which one it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Buffer

from .. import _kernels
from ..checkpoint.tensors import Array
from ..config import Config
from ..errors import StartupError
from . import memory, sizes
from .arena import ArenaViews, Batch, Layout
from .pad_sizes import PadSizes
from .sizes import Machine
from .step import Compute, Done, Pending, StepResult, Swap, exact_shape

log = logging.getLogger(__name__)


class Steps(Protocol):
    """Takes batches to the device and results back."""

    def submit(self, batch: Batch, compute: Compute, swap: Swap) -> Pending:
        """``compute`` gets the columns on the device, and the shape they have there. ``swap`` comes before it, if the
        batch has anything to swap, and gets the columns on the host."""
        ...

    def preparation(self, compute: Compute) -> Callable[[], None] | None:
        """A piece of work that makes later steps faster, for when none is under way; None: there is none."""
        ...


class Device(Protocol):
    """Where weights, cache and steps live."""

    torch_device: torch.device
    depth: int  # steps that may be under way at once
    machine: Machine  # what it adds to the arithmetic of memory

    def describe(self) -> str: ...
    def check_heads(self, head_dim: int, dtype: torch.dtype) -> None:
        """Raises StartupError (HS-E023) for heads that the device has no kernels for."""
        ...

    def free_bytes(self) -> int:
        """What may be used; below 0 where others have taken more than was left to them."""
        ...

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On the host, as the device copies from and to it fastest; not initialised."""
        ...

    def write(self, out: Tensor, values: Array) -> None:
        """``values`` (bfloat16 as uint16) into ``out``, a tensor of this device. Returns when ``values`` may go."""
        ...

    def steps(self, arenas: Sequence[Buffer], layout: Layout, pad_sizes: PadSizes) -> Steps: ...


class CpuDevice:
    """Plain memory and the kernels' own threads; a step is over when ``submit`` returns."""

    torch_device = torch.device("cpu")
    depth = 1
    machine = sizes.CPU

    def __init__(self, num_threads: int) -> None:
        """``num_threads``: of the kernels; 0: one per usable core."""
        _kernels.set_num_threads(num_threads)

    def describe(self) -> str:
        return f"cpu ({_kernels.isa()}, {_kernels.num_threads()} threads)"

    def check_heads(self, head_dim: int, dtype: torch.dtype) -> None:
        pass

    def free_bytes(self) -> int:
        """Memory that can be taken without swapping, within the limit of the control group if there is one."""
        return memory.free_bytes()

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def write(self, out: Tensor, values: Array) -> None:
        # torch knows no read-only tensors and warns of them; numpy writes through a view of `out` instead.
        target = out.view(torch.uint16) if out.dtype == torch.bfloat16 else out
        target.numpy()[...] = values

    def steps(self, arenas: Sequence[Buffer], layout: Layout, pad_sizes: PadSizes) -> CpuSteps:
        return CpuSteps([ArenaViews(arena, layout) for arena in arenas])


class CpuSteps:
    """Computes on the arenas themselves."""

    def __init__(self, views: Sequence[ArenaViews]) -> None:
        self._views = views

    def submit(self, batch: Batch, compute: Compute, swap: Swap) -> Done:
        views = self._views[batch.arena]
        if batch.num_swap_outs or batch.num_swap_ins:
            swap(views.tensors, batch)
        sampled = compute(views.tensors, exact_shape(batch, views))
        tokens, *logprobs = sampled
        # Copied, as the next step's tokens take the place of these.
        return Done(StepResult(tokens.numpy().copy(), *(None if one is None else one.numpy() for one in logprobs)))

    def preparation(self, compute: Compute) -> None:
        return None


def open_device(config: Config) -> Device:
    """Raises StartupError (HS-E025) for a device that this build or machine does not have."""
    engine = config.engine
    if engine.device == "cpu" or (engine.device == "auto" and not _has_cuda()):
        if engine.device == "auto" and torch.cuda.is_available():
            log.warning("there is a GPU, but hybrid-serve was built without CUDA kernels: it runs on the CPU")
        return CpuDevice(engine.cpu_threads)
    if not _kernels.has_cuda():
        raise StartupError(
            "HS-E025",
            "device cuda is not available",
            "hybrid-serve was built without CUDA: no nvcc (or a CMake before 3.28) was found then",
            "install it again where nvcc is on the PATH, or use --device cpu",
        )
    if not torch.cuda.is_available():
        raise StartupError(
            "HS-E025",
            "device cuda is not available",
            "no usable GPU: " + ("its driver does not answer" if torch.version.cuda else "torch was installed for CPU"),
            "nvidia-smi must list the GPU and torch must be one for CUDA; or use --device cpu",
        )
    from .cuda import CudaDevice

    return CudaDevice(config)


def _has_cuda() -> bool:
    return _kernels.has_cuda() and torch.cuda.is_available()
