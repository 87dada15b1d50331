"""Checkpoints of an offloader: saved, checked, restored."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.master.checkpoint import Checkpoint, CheckpointStore
from offload_trainer.master.master import Entries, stored_moments, stored_weights
from offload_trainer.master.moments import StateSpec
from offload_trainer.master.precision import FP32, Precision
from offload_trainer.offloader import Offloader
from offload_trainer.round import Boundary
from offload_trainer.structure import Structure


def save(offloader: Offloader, store: CheckpointStore, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint of the end of the last round: at any time, since the master changes only when a round ends."""
    return _write(offloader, store, extra, offloader.boundary())


def save_meanwhile(offloader: Offloader, store: CheckpointStore, extra: Mapping[str, Any] | None = None) -> None:
    """Between two rounds: write a checkpoint, while the next round trains where rounds overlap (see `at_boundary`)."""
    offloader.at_boundary(partial(_write, offloader, store, extra))


def _write(offloader: Offloader, store: CheckpointStore, extra: Mapping[str, Any] | None, boundary: Boundary) -> Path:
    parts: dict[str, Mapping[str, Tensor]] = {
        "weights": offloader.master,
        "structure": boundary.structure,
        "random": boundary.random,
        **{f"moments.{name}": tensors for name, tensors in offloader.moments.items()},
    }
    meta = {"offloader": boundary.numbers, "precision": offloader.precision.names, **(extra or {})}
    return store.save(boundary.numbers["steps"], parts, meta)


def check(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Any],
    trained: set[str],
    structure: Structure,
    precision: Precision = FP32,
) -> None:
    """Raise `UserError` unless the checkpoint is of such a run; reads headers only.

    tensors: the model's parameters and buffers, on any device, in the types they compute in. moments: the optimizer's
    names. precision: how the master stores both.
    """
    _require_precision(checkpoint, precision, moments)
    checkpoint.check("weights", _headers(stored_weights(tensors, precision)))
    computes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items() if name in trained}
    state_spec = StateSpec(moments, {}, None)
    for name in moments:
        stored = stored_moments(state_spec.entries(name, computes), precision)
        checkpoint.check(f"moments.{name}", _headers(stored))
    checkpoint.check("structure", structure.state_dict())


def restore(offloader: Offloader, checkpoint: Checkpoint) -> None:
    """Put a freshly made offloader where the checkpoint's was."""
    _require_precision(checkpoint, offloader.precision, offloader.moments)
    checkpoint.read_into("weights", offloader.master)
    for name, tensors in offloader.moments.items():
        checkpoint.read_into(f"moments.{name}", tensors)
    numbers = checkpoint.meta["offloader"]
    offloader.load_boundary(Boundary(numbers, checkpoint.read("structure"), checkpoint.read("random")))


def _require_precision(checkpoint: Checkpoint, precision: Precision, moments: Mapping[str, Any]) -> None:
    there = checkpoint.meta.get("precision", FP32.names)
    for key in ("weights", "moments") if moments else ("weights",):
        if precision.names[key] != there[key]:
            raise UserError(
                f"memory.{key} ({precision.names[key]}) must be {there[key]}, as in the checkpoint {checkpoint.path}"
            )


def _headers(entries: Entries) -> dict[str, Tensor]:
    """Tensors of these types and shapes, without memory."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in entries.items()}
