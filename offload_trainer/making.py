"""What a config asks for, made: accelerator, structure, optimizer, rate; and what of it a resumed run must share."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from offload_trainer.config import Config, OptimizerConfig
from offload_trainer.config.base import shown
from offload_trainer.device import ranks
from offload_trainer.device.numa import stay_near
from offload_trainer.device.processes import require_devices, use_all_cores
from offload_trainer.errors import UserError
from offload_trainer.groups import Groups, Plan
from offload_trainer.groups.slicing import named_tensors, rebuild
from offload_trainer.master.moments import OptimizerFactory
from offload_trainer.structure import Structure
from offload_trainer.tasks import Task


def master_folder(config: Config) -> Path | None:
    """Where the files of a mapped master lie."""
    return Path(config.memory.folder or config.out) if config.memory.master == "file" else None


def make_accelerator(config: Config) -> Accelerator:
    require_devices()
    precision = "bf16" if config.memory.autocast == "bf16" else "no"
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=config.track.trackers or None,  # type: ignore[arg-type]
            project_dir=config.out,
            cpu=not torch.accelerator.is_available(),  # asked for, so that several processes find each other on gloo
            kwargs_handlers=[InitProcessGroupKwargs(timeout=ranks.PATIENCE)],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"accelerate cannot start: {str(error).splitlines()[0]}") from error
    stay_near(accelerator.device)  # before any memory is touched
    use_all_cores()
    return accelerator


def require_same_config(config: Config, accelerator: Accelerator) -> None:
    """Raise `UserError`, naming the key, unless all ranks were started alike: each would train something else."""
    every = ranks.gather(accelerator, _flat(config.model_dump(mode="json", exclude={"memory": {"folder"}})))
    for key in dict.fromkeys(key for one in every for key in one):
        for rank, one in enumerate(every):
            if one.get(key) != every[0].get(key):
                raise UserError(f"{key} ({every[0].get(key)}) of rank 0 must be that of rank {rank} ({one.get(key)})")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def require_graphs(config: Config, accelerator: Accelerator) -> None:
    """Raise `UserError` where CUDA graphs are asked for and there is no CUDA."""
    if config.memory.cuda_graphs and accelerator.device.type != "cuda":
        raise UserError(f"memory.cuda_graphs (true) needs a CUDA device; this run is on {accelerator.device.type}")


def recompute_activations(model: nn.Module) -> None:
    """Raises `UserError` for a model that does not offer it."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"memory.recompute (true) needs a model of transformers that offers it; {type(model).__name__} does not"
        )
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def make_structure(config: Config, groups: Groups) -> Structure:
    section = config.structure
    return Structure(
        groups,
        section.share,
        per_group_keep=section.ratios,
        estimator=section.estimator,
        control=section.control,
        alpha=section.alpha,
        sampler=section.sampler,
        budget=section.budget,
        min_units=section.min_units,
        width_steps=groups.width_steps(section.multiple_of),
        lr=section.lr,
        paired_batches=section.paired_batches,
        schedule=section.schedule,
        start_keep=section.start_keep,
        schedule_steps=section.schedule_steps,
        explore=section.explore,
        explore_steps=config.exploring_steps if section.settle else 0,
        seed=config.seed,
    )


def export_note(config: Config, task: Task, groups: Groups) -> str | None:
    """Whether the export will lack a config, told from the widths at the end of the run."""
    if task.why_no_config is None:
        return None
    structure = make_structure(config, groups)
    varying = {
        "budget: global": structure.budget == "global",
        "sampler: bernoulli with result: best_of": structure.sampler == "bernoulli"
        and config.structure.result == "best_of",
    }
    for keys, varies in varying.items():
        if varies and len(structure.names) > 1:
            return f"the export has a config.json only if layers end with equal widths, which {keys} does not see to"
    structure.set_step(config.steps)
    plan = Plan(groups, structure.top())
    tensors = named_tensors(task.model)
    small = {name: torch.empty(plan.shape(name), dtype=t.dtype, device="meta") for name, t in tensors.items()}
    why = task.why_no_config(rebuild(task.model, small, plan, plan.groups))
    return None if why is None else f"the export will have no config.json: {why}"


def optimizer_factory(section: OptimizerConfig) -> OptimizerFactory:
    """Norms and biases (one axis) are not decayed by AdamW; SGD decays all, as the paper's runs do.

    Fused: one kernel for the whole step, several times as fast as torch's default on a CPU too.
    """

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        fused = all(parameter.is_floating_point() for parameter in parameters)  # torch has none for complex numbers
        if section.kind == "sgd":
            return torch.optim.SGD(
                parameters, lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay, fused=fused
            )
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": section.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=section.lr, betas=section.betas, fused=fused)

    return make


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    rate = config.optimizer.lr * learning_rate_factor(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate_factor(config: Config, step: int) -> float:
    """Share of the peak rate at a step: a linear warm-up, then constant, cosine or linear down to `min_lr_ratio`."""
    section = config.optimizer
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, config.steps - section.warmup_steps)
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        section.schedule
    ]
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * left


def resumable(config: Config) -> dict[str, object]:
    """What a resumed run must share with the run it goes on with; the rest of a config may change."""
    structure = config.structure
    return {
        "sync_every": config.sync_every,
        "seed": config.seed,
        "optimizer.kind": config.optimizer.kind,
        "optimizer.state": config.optimizer.state,
        "memory.weights": config.memory.weights,
        "memory.moments": config.memory.moments,
        "structure.sampler": structure.sampler,
        "structure.budget": structure.budget,
        "structure.keep": structure.share if structure.uses_keep else None,
        "structure.groups": structure.groups,
        "structure.rules": structure.rules,
        "structure.pin_unknown": structure.pin_unknown or None,
        "structure.multiple_of": structure.multiple_of,
        "structure.start": structure.start,
        "structure.reference": structure.reference,
        "structure.estimator": structure.estimator,
        "structure.control": structure.control,
    }


def of_checkpoint(config: Config) -> dict[str, object]:
    """What a checkpoint of a run says of its config: what must stay as it is, and all of it."""
    return {"config": resumable(config), "settings": _flat(config.model_dump(mode="json"))}


def changes(config: Config, meta: Mapping[str, Any]) -> str:
    """What is not as it was in the run that a checkpoint is of; "" if nothing, or if that does not say."""
    there, here = meta.get("settings", {}), _flat(config.model_dump(mode="json", exclude={"out", "resume"}))
    keys = [key for key in dict.fromkeys([*here, *there]) if key not in ("out", "resume")] if there else []
    other = [
        f"{key} {shown(here.get(key))} (was {shown(there.get(key))})" for key in keys if here.get(key) != there.get(key)
    ]
    return f"; not as it was: {', '.join(other)}" if other else ""
