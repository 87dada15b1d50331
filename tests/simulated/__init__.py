"""A GPU that is not there, for tests of what depends on when a device does its work.

What it is given waits in the queue of its stream, and runs as late as somebody asks for it or as early as chance has
it: in any order that streams and events allow. A copy from or to pinned memory reads and writes that memory only then.
Memory that the host has let go is filled with NaN in the order of the stream that took it, as if the next one there had
it, and nothing may write there from then on. So whatever relies on an order that nothing enforces computes with other
numbers, and a comparison tells.

Its tensors are CPU tensors inside, which kernels of the CPU compute with: it says nothing about speed, precision, or
kernels of a real device.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.simulated.gpu import Event, Gpu
from tests.simulated.tensors import CUDA, Mode, Simulated

__all__ = ["CUDA", "Gpu", "Simulated", "simulated"]


@contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Gpu]:
    """Context: there is a GPU, which is `CUDA`."""
    gpu = Gpu(seed)
    Simulated.gpu = gpu
    memory = {"memory_allocated": lambda *_: gpu.allocated, "max_memory_allocated": lambda *_: gpu.peak}
    fakes: dict[str, Any] = {
        **memory,
        "Stream": lambda *_, **__: gpu.new_stream(),
        "Event": lambda **options: Event(gpu, **options),
        "current_stream": lambda *_: gpu.current,
        "default_stream": lambda *_: gpu.default,
        "stream": gpu.on,
        "synchronize": gpu.synchronize,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device_count": lambda: 1,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "mem_get_info": lambda _: (2**33 - gpu.allocated, 2**33),
        "get_device_capability": lambda _: (9, 0),
        "get_device_name": lambda _: "simulated",
        "manual_seed_all": gpu.generator.manual_seed,
        "get_rng_state": lambda *_: gpu.generator.get_state(),
        "set_rng_state": lambda state, *_: gpu.generator.set_state(state),
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda at, size, _: gpu.pinned.update({at: size}) or 0,
            cudaHostUnregister=lambda at: gpu.pinned.pop(at),
        ),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # A module that is moved gets new parameters: the old ones cannot become tensors of another class.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(
        tensors: Any, with_indices: bool = False
    ) -> Any:  # optimizers take one kernel for all tensors of a device
        groups = group(tensors, with_indices)
        there = any(isinstance(x, Simulated) for x in tensors[0])
        return {(CUDA if there else device, dtype): found for (device, dtype), found in groups.items()}

    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    monkeypatch.setattr(Accelerator, "device", property(lambda _: CUDA))
    run = threading.Thread.run

    def with_mode(thread: threading.Thread) -> None:
        with Mode(gpu):
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", with_mode)
    with Mode(gpu):
        yield gpu
        gpu.require_order()
