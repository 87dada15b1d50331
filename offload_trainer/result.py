"""What a run leaves: the plan of the result, its BatchNorm recalibrated, as a small dense model on disk."""

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from errno import ENOSPC
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offload_trainer.device import ranks
from offload_trainer.errors import UserError
from offload_trainer.evaluation import UNCACHED, streamed
from offload_trainer.files.format import INDEX, WEIGHTS, readable
from offload_trainer.files.writing import write_json, write_shards
from offload_trainer.groups import Groups, Plan
from offload_trainer.groups.slicing import named_tensors, rebuild, take
from offload_trainer.offloader import LossFn, Offloader

PLAN = "plan.json"


def norms_of(module: nn.Module) -> list[_BatchNorm]:
    """Those that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Sequence[Any], loss_fn: LossFn, accelerator: Accelerator) -> None:
    """Replace BatchNorm's running statistics by those of the batches: a subnet shares them with others until now."""
    norms = norms_of(module)
    if not norms:
        return
    module.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    for batch in batches:
        with accelerator.autocast(UNCACHED):
            loss_fn(module, send_to_device(batch, accelerator.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    ranks.average_buffers(accelerator, module)
    module.train()


def recalibrate_master(model: nn.Module, batches: Sequence[Any], loss_fn: LossFn, accelerator: Accelerator) -> None:
    """`recalibrate` of the full master, in place: its units were trained in subnets, with the statistics of those."""
    with streamed(model, accelerator) as passing:
        recalibrate(passing, batches, loss_fn, accelerator)
        for path, norm in passing.named_modules():
            if isinstance(norm, _BatchNorm):  # while a master passes through a device, its buffers stay there
                for name, buffer in norm.named_buffers():
                    model.get_submodule(path).get_buffer(name).copy_(buffer)


@torch.no_grad()
def best_of(offloader: Offloader, samples: int, batches: Sequence[Any]) -> Plan:
    """Of `samples` draws from s and the units of the largest s, the plan of least mean loss on the batches."""
    plans = [
        offloader.agenda.top(),
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


def save_export(module: nn.Module, plan: Plan | None, folder: Path, shard_size: int) -> None:
    """Into an existing folder: the module's safetensors, in shards of at most so many bytes, and what it is a slice of.

    That is the kept units in `plan.json`, for a module that is a slice. Raises `OSError` when the disk is too full,
    before writing.
    """
    tensors = saved_tensors(module)
    need, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if need > free:
        sizes = f"it needs {readable(need)}, {readable(free)} are free"
        raise OSError(ENOSPC, f"{sizes}; make room and go on with resume: auto")
    write_shards(folder, tensors, shard_size)
    if plan is not None:
        write_json(folder / PLAN, {"kept": {name: plan[name].tolist() for name in plan}})


def load_export(folder: str | Path, model: nn.Module, groups: Groups) -> nn.Module:
    """The exported module, from the full-size `model` it was cut from and its groups.

    The model may lie on the meta device, unless it has buffers that are not saved.

    Raises `UserError` when the folder holds no export, one that is not whole, or one of another model.
    """
    folder = Path(folder)
    if not (folder / PLAN).is_file():
        raise UserError(f"{folder} holds no export (no {PLAN} in it)")
    try:
        kept = json.loads((folder / PLAN).read_text())["kept"]
        files = _weight_files(folder)
        plan = Plan(groups, {name: torch.tensor(indices) for name, indices in kept.items()})
        with ExitStack() as stack:
            handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            stored = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dict)
            tensors = {name: _exported(name, full, stored, plan, folder) for name, full in named_tensors(model).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is not a whole export ({error!r})") from error
    return rebuild(model, tensors, plan, groups).eval()


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds no export (no {WEIGHTS} in it)")
    return sorted({folder / file for file in json.loads((folder / INDEX).read_text())["weight_map"].values()})


def _exported(name: str, full: Tensor, stored: dict[str, Any], plan: Plan, folder: Path) -> Tensor:
    """A tensor of the exported module, `full` being the one of the whole model."""
    if name in stored:
        tensor = stored[name].get_tensor(name)
    elif full.is_meta:
        raise UserError(
            f"{folder} does not hold {name}, and the model is on the meta device: if it is a buffer that is not saved,"
            " build the model on the CPU"
        )
    else:
        tensor = take(full.detach(), plan, name).clone()  # a buffer that is not saved
    if tensor.shape != plan.shape(name):
        there, here = tuple(tensor.shape), tuple(plan.shape(name))
        raise UserError(f"{folder} is of another model: {name} is {there} there, {here} by its plan")
    return tensor


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once, where they are."""
    state = module.state_dict()
    return {name: state[name] for name in named_tensors(module) if name in state}
