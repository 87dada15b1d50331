"""What the processes of a run must agree on. With one process each of these is the identity."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from offload_trainer.device.streams import HostCopy
from offload_trainer.errors import UserError

PATIENCE = timedelta(hours=6)
"""Of ranks for one another: the first alone writes checkpoints and the export, hundreds of gigabytes at times."""
BUCKET = 2**26
"""Bytes from which on a message is sent: it has less than that beside its last tensor, and takes twice its size."""


def average_(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Each tensor ← its mean over the ranks, in few messages. The host does not wait for the device."""
    if accelerator.num_processes == 1:
        return
    for bucket in _buckets(tensors):
        _average(accelerator, bucket)


def _average(accelerator: Accelerator, bucket: list[Tensor]) -> None:  # apart: none of one message outlives it
    flat: Any = accelerator.reduce(torch.cat([tensor.reshape(-1) for tensor in bucket]), reduction="mean")
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Of one type each."""
    open_: dict[torch.dtype, list[Tensor]] = {}
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        open_.setdefault(tensor.dtype, []).append(tensor)
        sizes[tensor.dtype] += tensor.nbytes
        if sizes[tensor.dtype] >= BUCKET:
            sizes[tensor.dtype] = 0
            yield open_.pop(tensor.dtype)
    yield from open_.values()


def average_gradients(accelerator: Accelerator, parameters: Mapping[str, nn.Parameter]) -> None:
    """A parameter that some rank's share of the batch did not reach counts there with a gradient of zero; one that no
    rank reached stays without a gradient, or its optimizer would step it.

    The host waits for the device on a rank that did not reach them all, since it has to ask the others.
    """
    if accelerator.num_processes == 1:
        return
    every = list(parameters.values())
    missing = [i for i, parameter in enumerate(every) if parameter.grad is None]
    reached = torch.ones(len(every), device=accelerator.device)
    if missing:
        reached[missing] = 0
    for i in missing:
        every[i].grad = torch.zeros_like(every[i])
    average_(accelerator, [reached, *(parameter.grad for parameter in every if parameter.grad is not None)])
    if missing:
        shares = reached.tolist()
        for i in missing:
            if not shares[i]:
                every[i].grad = None


def average_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """BatchNorm statistics were gathered on different shares of each batch. What is the same on all ranks, a mask or a
    table of frequencies, stays so to the bit: it is the differences to the first rank's that are averaged."""
    if accelerator.num_processes == 1:
        return
    buffers = [buffer for buffer in module.buffers() if buffer.dtype.is_floating_point]
    firsts: Any = broadcast([buffer.clone() for buffer in buffers])
    apart = [torch.where(mine == first, 0, mine - first) for mine, first in zip(buffers, firsts, strict=True)]
    average_(accelerator, apart)
    for buffer, first, difference in zip(buffers, firsts, apart, strict=True):
        buffer.copy_(torch.where(difference == 0, first, first + difference))


def mean(accelerator: Accelerator, value: Tensor) -> float:
    """Mean over the ranks of a number. The host waits for the device here."""
    return float(accelerator.reduce(value.detach().reshape(1).float(), reduction="mean"))  # type: ignore[arg-type]


def count(accelerator: Accelerator, value: bool) -> HostCopy:
    """On how many ranks it is so, as `count`; on its way to the host. For several ranks."""
    here = torch.full((), float(value), device=accelerator.device)
    return HostCopy({"count": accelerator.reduce(here, reduction="sum")}, accelerator.device)  # type: ignore[dict-item]


def anywhere(accelerator: Accelerator, value: bool) -> bool:
    """Whether it is so on any rank. With several the host waits for the device here."""
    return value if accelerator.num_processes == 1 else bool(count(accelerator, value).result()["count"])


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """The value of every rank, in rank order. The host waits for other hosts, not for the device."""
    if accelerator.num_processes == 1:
        return [value]
    every = [value] * accelerator.num_processes
    dist.all_gather_object(every, value, group=_hosts(dist.group.WORLD))
    return every


@lru_cache(1)
def _hosts(_: Any) -> Any:
    """The same processes, reached without their devices: NCCL would wait for all that those have to do."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def require_same(accelerator: Accelerator, what: str, value: str) -> None:
    """Every rank must hold the same value (a plan's digest); their masters would part ways unnoticed otherwise."""
    values = gather(accelerator, value)
    if len(set(values)) > 1:
        raise UserError(f"the ranks disagree on {what}: {values}; were they started with the same config and seed?")
