"""What the processes of a run must agree on. With one process each of these is the identity."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from offload_trainer.errors import UserError


def average_(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Each tensor ← its mean over the ranks, in one message per dtype."""
    if accelerator.num_processes == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        flat = accelerator.reduce(flat, reduction="mean")
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):  # type: ignore[union-attr]
            tensor.copy_(part.view_as(tensor))


def average_gradients(accelerator: Accelerator, parameters: Mapping[str, nn.Parameter]) -> None:
    """A parameter that some rank's share of the batch did not reach counts there with a gradient of zero.

    With several ranks the host waits for the device here, in every step: a parameter that no rank reached must stay
    without a gradient, or its optimizer would step it.
    """
    if accelerator.num_processes == 1:
        return
    device = accelerator.device
    there = torch.tensor([float(p.grad is not None) for p in parameters.values()], device=device)
    anywhere: Any = accelerator.reduce(there, reduction="sum")
    for parameter, count in zip(parameters.values(), anywhere.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average_(accelerator, [p.grad for p in parameters.values() if p.grad is not None])


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


def anywhere(accelerator: Accelerator, value: bool) -> bool:
    """Whether it is so on any rank. With several the host waits for the device here."""
    if accelerator.num_processes == 1:
        return value
    total: Any = accelerator.reduce(torch.tensor(float(value), device=accelerator.device), reduction="sum")
    return bool(total)


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """The value of every rank, in rank order."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def require_same(accelerator: Accelerator, what: str, value: str) -> None:
    """Every rank must hold the same value (a plan's digest); their masters would part ways unnoticed otherwise."""
    values = gather(accelerator, value)
    if len(set(values)) > 1:
        raise UserError(f"the ranks disagree on {what}: {values}; were they started with the same config and seed?")
