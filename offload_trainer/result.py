"""What a run leaves: the plan of the result, its BatchNorm recalibrated, as a small dense model on disk."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offload_trainer.device import ranks
from offload_trainer.errors import UserError
from offload_trainer.groups import Groups, Plan
from offload_trainer.groups.slicing import named_tensors, rebuild
from offload_trainer.master.checkpoint import write_json
from offload_trainer.master.streaming import write_safetensors
from offload_trainer.offloader import Offloader

LossFn = Callable[[nn.Module, Any], Tensor]
PLAN = "plan.json"
WEIGHTS = "model.safetensors"


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Sequence[Any], loss_fn: LossFn, accelerator: Accelerator) -> None:
    """Replace BatchNorm's running statistics by those of the batches: a subnet shares them with others until now."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    module.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    for batch in batches:
        with accelerator.autocast():
            loss_fn(module, send_to_device(batch, accelerator.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    ranks.average_buffers(accelerator, module)
    module.train()


@torch.no_grad()
def best_of(offloader: Offloader, samples: int, batches: Sequence[Any]) -> Plan:
    """Of `samples` draws from s and the units of the largest s, the plan of least mean loss on the batches."""
    plans = [
        offloader.top_plan(),
        *(Plan(offloader.groups, offloader.structure.draw()) for _ in range(samples)),
    ]
    losses = []
    for plan in plans:
        module = offloader.export(plan).to(offloader.device)
        recalibrate(module, batches, offloader.loss_fn, offloader.accelerator)
        module.eval()
        total = torch.zeros((), device=offloader.device)
        for batch in batches:
            with offloader.accelerator.autocast():
                total += offloader.loss_fn(module, send_to_device(batch, offloader.device))
        losses.append(ranks.mean(offloader.accelerator, total))
    return plans[min(range(len(plans)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)]


def save_export(module: nn.Module, plan: Plan, folder: Path) -> None:
    """Into an existing folder: `model.safetensors`, and in `plan.json` the kept units: what it is a slice of."""
    write_safetensors(folder / WEIGHTS, saved_tensors(module), {"format": "pt"})
    write_json(folder / PLAN, {"kept": {name: plan[name].tolist() for name in plan}})


def load_export(folder: str | Path, model: nn.Module, groups: Groups) -> nn.Module:
    """The exported module, from the full-size `model` it was cut from (the meta device will do) and its groups.

    Raises `UserError` when the folder holds no export, or one of another model.
    """
    folder = Path(folder)
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no export (no {name} in it)")
    kept = json.loads((folder / PLAN).read_text())["kept"]
    plan = Plan(groups, {name: torch.tensor(indices) for name, indices in kept.items()})
    tensors: dict[str, Tensor] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
        for name, full in named_tensors(model).items():
            if name in stored:
                tensors[name] = file.get_tensor(name)
            elif full.is_meta:
                raise UserError(f"{folder / WEIGHTS} does not hold {name}, and the model is on the meta device")
            else:
                tensors[name] = full.detach().clone()  # a buffer that is not saved
            if tensors[name].shape != plan.shape(name):
                there, here = tuple(tensors[name].shape), tuple(plan.shape(name))
                raise UserError(f"{folder} is of another model: {name} is {there} there, {here} by its plan")
    return rebuild(model, tensors, plan, groups).eval()


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once, contiguous on the host."""
    state = module.state_dict()
    return {name: state[name].detach().cpu().contiguous() for name in named_tensors(module) if name in state}
