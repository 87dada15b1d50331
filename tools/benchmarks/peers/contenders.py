"""Who takes part."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch

from benchmarks.peers import fsdp, ours, plain, torchao, zero
from benchmarks.peers.sizes import Size
from benchmarks.peers.trainer import Trainer

KEEP = (0.5, 0.35, 0.25, 0.1)


@dataclass(frozen=True)
class Contender:
    label: str
    start: Callable[[Size, torch.device], Trainer]
    precision: str
    """Weights as kept, and how it computes."""
    package: str | None = None
    """What must be installed for it."""
    cuda: bool = False
    """Runs on nothing else."""
    capped: bool = True
    """Held to the device-memory cap."""
    compiles: bool = False
    """Its first start compiles for minutes."""


def _ours(keep: float) -> Contender:
    return Contender(f"ours, ρ = {keep}", partial(ours.start, keep=keep), "fp32, bf16 autocast")


CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        "resident": Contender("plain training, no cap", plain.start, "fp32, bf16 autocast", cuda=True, capped=False),
        "plain": Contender("plain training", plain.start, "fp32, bf16 autocast"),
        "zero-offload": Contender(
            "DeepSpeed ZeRO-Offload", zero.start_offload, "fp32 and bf16, bf16", package="deepspeed", compiles=True
        ),
        "zero-3": Contender(
            "DeepSpeed ZeRO-3, all offloaded",
            zero.start_stage_3,
            "fp32 and bf16, bf16",
            package="deepspeed",
            compiles=True,
        ),
        "fsdp2": Contender("FSDP2, CPUOffloadPolicy", fsdp.start, "fp32, bf16"),
        "torchao": Contender(
            "torchao CPUOffloadOptimizer", torchao.start, "fp32, bf16 autocast", package="torchao", cuda=True
        ),
        "torchao-bf16": Contender(
            "torchao CPUOffloadOptimizer, bf16 states",
            partial(torchao.start, dtype=torch.bfloat16),
            "bf16, bf16",
            package="torchao",
            cuda=True,
        ),
        **{f"ours-{keep}": _ours(keep) for keep in KEEP},
    }
)
"""The first of them that runs is what the others are compared with."""
