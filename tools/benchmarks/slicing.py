"""What slicing saves: a training step of the sliced subnet against the full network, dense and masked."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.records import Record, Setting
from benchmarks.timing import take_turns, times_faster
from benchmarks.workloads import Workload, llama, on_device, training_step, vision
from offload_trainer.groups import Plan, random_plan, slice_module

KEEP = (0.5, 0.25, 0.1)  # of every group, so of every axis
REPEATS = {"quick": 3, "cpu": 5, "cuda": 11}
AIMED_AT = (0.5, 0.25)  # full ÷ sliced ≥ 0.7 / ρ² there


def workloads(size: str) -> list[Workload]:
    match size:
        case "quick":
            return [
                llama(hidden=128, intermediate=256, heads=4, layers=2, batch=2, sequence=32),
                vision("resnet32", width=0.5, batch=2, image=16),
            ]
        case "cpu":
            return [
                llama(hidden=1024, intermediate=4096, heads=16, layers=4, batch=4, sequence=256),
                vision("vgg19_bn", width=1, batch=16),
                vision("resnet32", width=4, batch=16),
            ]
        case _:
            return [
                llama(hidden=4096, intermediate=14336, heads=32, layers=4, batch=8, sequence=1024),
                vision("vgg19_bn", width=4, batch=256),
                vision("resnet32", width=16, batch=256),
            ]


def measure(setting: Setting) -> Iterator[Record]:
    torch.manual_seed(0)
    for workload in workloads(setting.size):
        model = workload.build()
        generator = torch.Generator().manual_seed(0)
        groups = workload.groups(model)
        for keep in KEEP:
            plan = random_plan(groups, generator, keep)
            yield from compare(setting, workload, model, plan, keep)


def compare(setting: Setting, workload: Workload, model: nn.Module, plan: Plan, keep: float) -> Iterator[Record]:
    """Two records for one plan: against the full network as it is, and with masks in it."""
    repeats = REPEATS[setting.size]
    batches = on_device(workload, 2, setting.device)
    whole = Plan.whole(plan.groups)

    def copy_of(plan: Plan) -> nn.Module:
        return slice_module(model, plan, plan.groups).to(setting.device).train()

    # Each has weights, gradients and optimizer state of its own.
    contenders = {"sliced": copy_of(plan), "dense": copy_of(whole), "masked": Masked(copy_of(whole), plan)}
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in contenders.items()}
    steps = {name: training_step(module, workload, batches, setting.accelerator) for name, module in contenders.items()}
    seconds = take_turns(steps, repeats, setting.device)
    for baseline, label, suffix in (
        ("dense", "full dense network", ""),
        ("masked", "full network, masks on its weights", " masks"),
    ):
        aimed_at = baseline == "dense" and workload.name == "llama" and keep in AIMED_AT
        yield setting.record(
            "slicing",
            f"{workload.name} rho={keep}{suffix}",
            1e3 * median(seconds["sliced"]),
            "ms per step",
            times_faster(seconds, "sliced", baseline),
            label,
            repeats=repeats,
            against_value=1e3 * median(seconds[baseline]),
            parameters=parameters["sliced"],
            parameters_full=parameters["dense"],
            aim=0.7 / keep**2 if aimed_at else None,
        )


class Masked(nn.Module):
    """A full network with 0/1 masks multiplied into its weights at every forward, as `torch.nn.utils.prune` does it.

    It learns the weights that the sliced network of the same plan learns, and saves nothing.
    """

    def __init__(self, network: nn.Module, plan: Plan):
        super().__init__()
        self.network = network
        self.masks = {name: mask_of(plan, name).to(p) for name, p in network.named_parameters() if plan.slices(name)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = dict(self.network.named_parameters())
        weights |= {name: weights[name] * mask for name, mask in self.masks.items()}
        return functional_call(self.network, weights, args, kwargs)


def mask_of(plan: Plan, tensor: str) -> Tensor:
    """True where the plan keeps an element of a tensor; its full shape."""
    mask = torch.ones(plan.groups.shapes[tensor], dtype=torch.bool)
    for axis, kept in enumerate(plan.indices(tensor)):
        if kept is not None:
            dropped = torch.ones(mask.shape[axis], dtype=torch.bool)
            dropped[kept] = False
            mask.index_fill_(axis, dropped.nonzero().flatten(), False)
    return mask
