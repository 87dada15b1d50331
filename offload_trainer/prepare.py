"""Everything a run needs, made from its config; all that can be wrong with it is found here, before it is paid for."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from offload_trainer import snapshot, tasks
from offload_trainer.config import Config, OptimizerConfig
from offload_trainer.device.processes import require_devices, use_all_cores
from offload_trainer.errors import UserError
from offload_trainer.groups import Groups, Plan, find_groups, read_rules, verify_groups
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master import (
    Checkpoint,
    CheckpointStore,
    Ledger,
    StateLayout,
    find_checkpoint,
    predict,
    probe_optimizer,
)
from offload_trainer.structure import Structure

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Prepared:
    """A run that may begin."""

    accelerator: Accelerator
    task: tasks.Task
    groups: Groups
    structure: Structure
    optimizer: OptimizerFactory
    ledger: Ledger
    checkpoint: Checkpoint | None
    """To resume from."""


def prepare(config: Config) -> Prepared:
    """Raises `UserError` for whatever the user can mend. Nothing full-size is allocated but what verifying takes."""
    accelerator = make_accelerator(config)
    out = Path(config.out)
    if not config.dry_run:
        require_writable(out)
    set_seed(config.seed)
    task = tasks.build_task(config.task, config.seed)
    # Raises if the batch does not divide by the number of processes.
    batch = tasks.shard(task.train[0], accelerator.process_index, accelerator.num_processes)
    if config.structure.rules is not None:
        groups = read_rules(config.structure.rules, task.model, task.widths)
    else:
        groups = find_groups(
            task.model, task.example_inputs, widths=task.widths, pin_unknown=config.structure.pin_unknown
        )
    structure = make_structure(config, groups)
    optimizer = optimizer_factory(config.optimizer)
    layout = StateLayout({}, {}, None)
    if config.optimizer.state == "carry":
        layout = probe_optimizer(optimizer, next(task.model.parameters()).dtype, accelerator.device)
    checkpoint = checkpoint_to_resume(config, out, task.model, layout, structure)
    if config.structure.verify and structure.names:
        verify_groups(task.model, groups, task.example_inputs)
    ledger = predict(
        task.model,
        Plan(groups, structure.top()),
        layout,
        task.loss_fn,
        batch,
        reference=bool(structure.names),
        staged=accelerator.device.type != "cpu",
        autocast=config.memory.autocast == "bf16",
    )
    return Prepared(accelerator, task, groups, structure, optimizer, ledger, checkpoint)


def make_accelerator(config: Config) -> Accelerator:
    require_devices()
    use_all_cores()
    precision = "bf16" if config.memory.autocast == "bf16" else "no"
    try:
        return Accelerator(
            mixed_precision=precision,
            log_with=config.track.trackers or None,  # type: ignore[arg-type]
            project_dir=config.out,
            cpu=not torch.accelerator.is_available(),  # asked for, so that several processes find each other on gloo
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"accelerate cannot start: {str(error).splitlines()[0]}") from error


def make_structure(config: Config, groups: Groups) -> Structure:
    section = config.structure
    return Structure(
        groups,
        section.share,
        per_group_keep=section.ratios,
        estimator=section.estimator,
        alpha=section.alpha,
        sampler=section.sampler,
        budget=section.budget,
        min_units=section.min_units,
        lr=section.lr,
        paired_batches=section.paired_batches,
        schedule=section.schedule,
        start_keep=section.start_keep,
        schedule_steps=section.schedule_steps,
        seed=config.seed,
    )


def optimizer_factory(section: OptimizerConfig) -> OptimizerFactory:
    """Norms and biases (one axis) are not decayed by AdamW; SGD decays all, as the paper's runs do."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if section.kind == "sgd":
            return torch.optim.SGD(
                parameters, lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay
            )
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": section.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=section.lr, betas=section.betas)

    return make


def checkpoint_to_resume(
    config: Config, out: Path, model: nn.Module, layout: StateLayout, structure: Structure
) -> Checkpoint | None:
    """The checkpoint that `resume` names, checked against this run from its headers alone."""
    if config.resume is None:
        return None
    folder = out / "checkpoints"
    if config.resume == "auto":
        if CheckpointStore(folder).is_empty():
            return None  # a first start with the same command line
        checkpoint = find_checkpoint(folder)
    else:
        checkpoint = find_checkpoint(Path(config.resume))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    snapshot.check(checkpoint, named_tensors(model), layout.moments, trained, structure)
    if checkpoint.meta["step"] > config.steps:
        raise UserError(
            f"steps ({config.steps}) must be at least {checkpoint.meta['step']}, where {checkpoint.path} stands"
        )
    for key, here in resumable(config).items():
        there = checkpoint.meta["config"].get(key)
        if there != here:
            raise UserError(f"{key} ({here}) must be {there}, as in the checkpoint {checkpoint.path}")
    return checkpoint


def resumable(config: Config) -> dict[str, object]:
    """What a resumed run must share with the run it goes on with; the rest of a config may change."""
    structure = config.structure
    return {
        "sync_every": config.sync_every,
        "seed": config.seed,
        "optimizer.kind": config.optimizer.kind,
        "optimizer.state": config.optimizer.state,
        "structure.sampler": structure.sampler,
        "structure.budget": structure.budget,
        "structure.keep": structure.share if structure.uses_keep else None,
        "structure.groups": structure.groups,
    }


def require_writable(out: Path) -> None:
    """Raise unless files can be made in `out` (made here if need be) or, while it does not exist, in its parent."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        for name in ("checkpoints", "export"):
            if (out / name).exists() and not (out / name).is_dir():
                raise UserError(f"out ({out}): {name} in it must be a folder, it is a file")
        for name in ("metrics.jsonl", "summary.json"):
            if (out / name).is_dir():
                raise UserError(f"out ({out}): {name} in it must be a file, it is a folder")
    except OSError as error:
        raise UserError(f"out ({out}) must be a folder that can be written: {error.strerror or error}") from error
