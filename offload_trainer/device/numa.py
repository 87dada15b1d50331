"""Keep a process on the processors next to its GPU: pinned memory that it touches then lies on that side too."""

import ctypes
import os
from pathlib import Path

import torch

SYSTEM = Path("/sys/bus/pci/devices")


def stay_near(device: torch.device) -> None:
    """From now on threads and memory of this process are of the GPU's NUMA node, as far as the process may run there.

    Copies that cross nodes move at a fraction of the speed. Where the node is unknown (one node, a virtual machine, no
    GPU) nothing changes.
    """
    if device.type != "cuda" or not hasattr(os, "sched_setaffinity"):
        return
    near = os.sched_getaffinity(0) & processors_near(_bus_id(device))
    if near:
        os.sched_setaffinity(0, near)


def processors_near(bus_id: str, system: Path = SYSTEM) -> set[int]:
    """Of the NUMA node of a PCI device; none where the system does not tell."""
    try:
        text = (system / bus_id.lower() / "local_cpulist").read_text().strip()
    except OSError:
        return set()
    ranges = (part.partition("-") for part in text.split(",") if part)
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def _bus_id(device: torch.device) -> str:
    """Such as 0000:17:00.0; asked of the driver, whose ordinals are those of CUDA_VISIBLE_DEVICES, as torch's are."""
    torch.cuda.init()
    name = ctypes.create_string_buffer(32)
    driver = ctypes.CDLL("libcuda.so.1")
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    return name.value.decode() if driver.cuDeviceGetPCIBusId(name, len(name), ordinal) == 0 else ""
