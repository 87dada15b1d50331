"""Validation of any module: a subnet, or the full master, which need not fit the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import send_to_device
from torch import Tensor, nn

MetricsFn = Callable[[nn.Module, Any], Mapping[str, Tensor]]


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Sequence[Any],
    metrics_fn: MetricsFn,
    count: Callable[[Any], int],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Means of the metrics over the batches, weighted by `count`; each rank takes its share of the batches."""
    training = module.training
    module.eval()
    sums: dict[str, float] = {}
    total = 0
    for i in range(accelerator.process_index, len(batches), accelerator.num_processes):
        batch = send_to_device(batches[i], accelerator.device)
        weight = count(batch)
        with accelerator.autocast():
            metrics = metrics_fn(module, batch)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value) * weight
        total += weight
    module.train(training)
    if accelerator.num_processes == 1:
        return {name: value / total for name, value in sums.items()}
    names = sorted(sums)
    mine = torch.tensor([*(sums[name] for name in names), float(total)], dtype=torch.float64)
    every: Any = accelerator.reduce(mine.float().to(accelerator.device), reduction="sum")
    *values, weight = every.tolist()
    return {name: value / weight for name, value in zip(names, values, strict=True)}


def evaluate_full(
    model: nn.Module,
    batches: Sequence[Any],
    metrics_fn: MetricsFn,
    count: Callable[[Any], int],
    accelerator: Accelerator,
) -> dict[str, float]:
    """`evaluate` of the master itself: on another device than the host, one layer at a time passes through it."""
    if accelerator.device.type == "cpu":
        return evaluate(model, batches, metrics_fn, count, accelerator)
    cpu_offload(model, accelerator.device, state_dict=dict(model.state_dict()))
    try:
        return evaluate(model, batches, metrics_fn, count, accelerator)
    finally:
        remove_hook_from_submodules(model)
