"""Pinning host memory, and how much memory is in use: the one place that asks CUDA."""

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from offload_trainer.errors import UserError

HEAP_BLOCK = int(os.environ.get("MALLOC_MMAP_THRESHOLD_") or 2**25)
"""Bytes from which on glibc maps each block by itself, and gives it back when it is freed; smaller ones come from its
heap and leave gaps there. Unless set, that grows with what a process has freed, up to 32 MiB."""


def register(tensor: Tensor) -> None:
    """Pin exactly the bytes of a host tensor (torch's pinned allocator would round up to a power of two).

    About three times as fast once all its pages have been touched, as torch's threads do when they fill it.
    """
    nbytes = tensor.numel() * tensor.element_size()
    runtime: Any = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(tensor.data_ptr(), nbytes, 0))
    if status != 0:
        raise UserError(f"cannot pin {nbytes / 2**30:.2f} GiB of host memory (CUDA error {status}); see `ulimit -l`")


def unregister(tensor: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(tensor.data_ptr())


def use(device: torch.device) -> None:
    """Make it this thread's; a thread's first is GPU 0, on which asking another rank's GPU would open a context too."""
    if device.type == "cuda":
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device.index)


def device_bytes(device: torch.device) -> int | None:
    """Bytes in use by tensors on the device; None on a CPU, whose tensors are host memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def device_peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def host_bytes() -> int:
    """Resident set size of this process."""
    return psutil.Process().memory_info().rss


def host_peak() -> int:
    """Largest resident set size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts from the size of whoever started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trim_heap() -> None:
    """Return to the system what the process has freed; glibc keeps freed blocks of up to 32 MiB for later."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def host_available() -> int:
    """Bytes of host memory that this process may still take: what is free, or what its control groups leave it."""
    return max(0, min([psutil.virtual_memory().available, *left_by_groups()]))


def left_by_groups(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Limit less usage of each control group that this process is in (version 1 or 2). Cached files count as free."""
    try:
        paths = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in paths:
        version_1 = "memory" in controllers.split(",")
        if controllers and not version_1:
            continue
        names = (
            ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
            if version_1
            else ("max", "current", "inactive_file")
        )
        top = root / "memory" if version_1 else root
        below = Path(path.lstrip("/"))
        for folder in (top / below, *(top / parent for parent in below.parents)):
            try:
                limit, usage = ((folder / f"memory.{name}").read_text().strip() for name in names[:2])
                cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # in a container the path is not always there; its own group then is the top folder
            if limit.isdigit():
                left.append(int(limit) - int(usage) + int(cached.get(names[2], 0)))
    return left


def device_available(device: torch.device) -> int | None:
    """Bytes of the device's memory that are free now; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def workspace_bytes(device: torch.device) -> int:
    """What cuBLAS takes from torch's allocator, for the thread of the forward and again for that of the backward."""
    if device.type != "cuda":
        return 0
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    return 2 * (8 * 4096 if hopper else 2 * 4096 + 8 * 16) * 1024  # torch's defaults of CUBLAS_WORKSPACE_CONFIG


def load_libraries(device: torch.device) -> None:
    """Have those of a GPU's matrix products loaded, which take hundreds of MiB of host memory when first used."""
    if device.type == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.ones(16, 16, dtype=dtype, device=device, requires_grad=True)
            (weight @ weight).sum().backward()


def synchronize(device: torch.device) -> None:
    """The host waits for the device here; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
