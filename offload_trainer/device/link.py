"""How fast host and device exchange bytes."""

from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from offload_trainer import memory
from offload_trainer.master.slab import Slab

PROBED = 2**26
"""Bytes that are copied to probe it, in about a hundredth of a second: more than caches hold."""


@dataclass(frozen=True)
class Link:
    """Bytes per second of a plain copy from pinned memory; on a CPU of a copy within memory."""

    to_device: float
    to_host: float

    @property
    def both_ways(self) -> float:
        """Of as many bytes there as back."""
        return 2 / (1 / self.to_device + 1 / self.to_host)


def probe_link(device: torch.device, nbytes: int = PROBED, repeats: int = 4) -> Link:
    """Best of a few copies each way."""
    host = Slab({"copied": torch.Size([nbytes])}, torch.uint8, pin=device.type == "cuda")
    there = Slab({"copied": torch.Size([nbytes])}, torch.uint8, device)
    host.flat.zero_()
    there.flat.zero_()
    try:
        return Link(
            *(nbytes / _best(*way, device, repeats) for way in ((host.flat, there.flat), (there.flat, host.flat)))
        )
    finally:
        host.close()


def _best(source: Tensor, target: Tensor, device: torch.device, repeats: int) -> float:
    """Seconds."""
    seconds = []
    for _ in range(repeats):
        memory.synchronize(device)
        start = perf_counter()
        target.copy_(source)
        memory.synchronize(device)
        seconds.append(perf_counter() - start)
    return min(seconds)
