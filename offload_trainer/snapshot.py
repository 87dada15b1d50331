"""Checkpoints of an offloader: saved, checked, restored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from offload_trainer.master.checkpoint import Checkpoint, CheckpointStore
from offload_trainer.offloader import Offloader
from offload_trainer.rounds import Boundary
from offload_trainer.structure import Structure


def save(offloader: Offloader, store: CheckpointStore, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint of the end of the last round: at any time, since the master changes only when a round ends."""
    boundary = offloader.boundary()
    parts: dict[str, Mapping[str, Tensor]] = {
        "weights": offloader.master,
        "structure": boundary.structure,
        "random": boundary.random,
        **{f"moments.{name}": tensors for name, tensors in offloader.moments.items()},
    }
    return store.save(boundary.numbers["steps"], parts, {"offloader": boundary.numbers, **(extra or {})})


def check(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Any],
    trained: set[str],
    structure: Structure,
) -> None:
    """Raise `UserError` unless the checkpoint is of such a run; reads headers only.

    tensors: the model's parameters and buffers, on any device. moments: the optimizer's names.
    """
    checkpoint.check("weights", tensors)
    for name in moments:
        checkpoint.check(f"moments.{name}", {n: tensor for n, tensor in tensors.items() if n in trained}, dtype=False)
    checkpoint.check("structure", structure.state_dict())


def restore(offloader: Offloader, checkpoint: Checkpoint) -> None:
    """Put a freshly made offloader where the checkpoint's was."""
    checkpoint.read_into("weights", offloader.master)
    for name, tensors in offloader.moments.items():
        checkpoint.read_into(f"moments.{name}", tensors)
    numbers = checkpoint.meta["offloader"]
    offloader.load_boundary(Boundary(numbers, checkpoint.read("structure"), checkpoint.read("random")))
