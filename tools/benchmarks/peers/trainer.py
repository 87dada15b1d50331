"""What every contender is made into, so that all are measured alike."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.sizes import Batch, Size, batches, loss_fn

ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
"""Of every contender's AdamW."""
BATCHES = 4
"""Different ones, read in turns."""


def nothing() -> None:
    """What most contenders do where one has something to do."""


@dataclass
class Trainer:
    """A contender, ready to train."""

    step: Callable[[], Tensor]
    """One optimizer step; its loss, which may still be on its way on the device."""
    parameters: int
    """Of the model."""
    trained: int
    """Of them, what a step computes with and updates."""
    link_bytes: Callable[[], float]
    """Bytes that cross the link between host and device in a step, both ways together; called after steps."""
    link_source: str
    """How that number comes about."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings that were chosen for it."""
    turn: int = 1
    """Steps that are timed together: of ours a whole round."""
    warm: Callable[[], None] = nothing
    """Instead of a step or two, what must have run once before the clock starts."""
    close: Callable[[], None] = nothing


def job_of_one() -> None:
    """Say where this process finds the others: FSDP and DeepSpeed ask, even if there are none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def numel(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def data(size: Size, device: torch.device) -> Iterator[Batch]:
    """Batches without end."""
    return cycle(batches(size, BATCHES, device))


def ordinary_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Batch], autocast: str | None
) -> Callable[[], Tensor]:
    """Forward, backward and optimizer step as one writes them. autocast: type of device that computes in bf16."""

    def step() -> Tensor:
        with torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None):
            loss = loss_fn(module, next(data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
