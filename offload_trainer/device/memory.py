"""Pinning host memory, and how much memory is in use: the one place that asks CUDA."""

from typing import Any

import psutil
import torch
from torch import Tensor

from offload_trainer.errors import UserError


def register(tensor: Tensor) -> None:
    """Pin exactly the bytes of a host tensor (torch's pinned allocator would round up to a power of two)."""
    # Touching the pages first, from torch's threads, makes registration about three times faster.
    tensor.zero_()
    nbytes = tensor.numel() * tensor.element_size()
    runtime: Any = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(tensor.data_ptr(), nbytes, 0))
    if status != 0:
        raise UserError(f"cannot pin {nbytes / 2**30:.2f} GiB of host memory (CUDA error {status}); see `ulimit -l`")


def unregister(tensor: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(tensor.data_ptr())


def device_bytes(device: torch.device) -> int | None:
    """Bytes in use by tensors on the device; None on a CPU, whose tensors are host memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def device_peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def host_bytes() -> int:
    """Resident set size of this process."""
    return psutil.Process().memory_info().rss


def synchronize(device: torch.device) -> None:
    """The host waits for the device here; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(device: torch.device, states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
