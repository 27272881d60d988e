"""The device as an object: what the runner asks of the machine, so that nothing else asks which one it is."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _kernels
from ..config import EngineConfig
from ..errors import StartupError
from . import memory


class CpuDevice:
    """Plain memory and the kernels' own threads."""

    name = "cpu"
    # A step of this many tokens takes about 0.25 s on two cores with a model of 135M: that is how long a long prompt
    # makes a running stream wait. More would lengthen the wait and, measured, not add throughput.
    default_batched_tokens = 512

    def __init__(self, num_threads: int) -> None:
        """``num_threads``: of the kernels; 0: one per usable core."""
        _kernels.set_num_threads(num_threads)

    def describe(self) -> str:
        return f"cpu ({_kernels.isa()}, {_kernels.num_threads()} threads)"

    def free_bytes(self) -> int:
        """Memory that can be taken without swapping, within the limit of the control group if there is one."""
        return memory.free_bytes()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Not initialised; the system provides pages as they are first written."""
        return torch.empty(shape, dtype=dtype)


def open_device(config: EngineConfig) -> CpuDevice:
    """Raises StartupError (HS-E025) for a device that this build or machine does not have."""
    if config.device == "cuda":
        raise StartupError(
            "HS-E025",
            "device cuda is not available",
            "this version runs models on the CPU only",
            "leave --device out, or use --device cpu",
        )
    return CpuDevice(config.cpu_threads)
