"""Which checkpoint a run goes on from, and whether it can."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from offload_trainer import snapshot
from offload_trainer.errors import UserError
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master import Checkpoint, CheckpointStore, StateSpec, find_checkpoint
from offload_trainer.master.precision import Precision
from offload_trainer.structure import Structure


def checkpoint_to_resume(resume: str | None, out: Path) -> Checkpoint | None:
    """The checkpoint that `resume` names: a folder, or "auto" for the newest in `out`."""
    folder = out / "checkpoints"
    if resume is None or (resume == "auto" and CheckpointStore(folder).is_empty()):
        return None  # without any it is a first start with the same command line
    checkpoint = find_checkpoint(folder if resume == "auto" else Path(resume))
    if not isinstance(checkpoint.meta.get("config"), Mapping):
        raise UserError(f"resume: {checkpoint.path} does not say of what config it is: it must be of a run of run.py")
    return checkpoint


def require_resumable(
    checkpoint: Checkpoint,
    shared: Mapping[str, object],
    steps: int,
    model: nn.Module,
    state_spec: StateSpec,
    structure: Structure,
    precision: Precision,
) -> None:
    """Raise unless a run of so many steps can go on from a checkpoint, as far as its headers tell.

    shared: config key → value of what must be as it was.
    """
    if checkpoint.meta["step"] > steps:
        raise UserError(f"steps ({steps}) must be at least {checkpoint.meta['step']}, where {checkpoint.path} stands")
    for key, here in shared.items():
        there = checkpoint.meta["config"].get(key, here)  # an older checkpoint may not know of it
        if there != here:
            raise UserError(f"{key} ({here}) must be {there}, as in the checkpoint {checkpoint.path}")
    # Last: where a key differs, so may the tensors, and the key says it better.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    snapshot.check(checkpoint, named_tensors(model), state_spec.moments, trained, structure, precision)
