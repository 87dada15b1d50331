"""Validation of any module: a subnet, or the full master, which need not fit the device."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload
from accelerate.utils import AutocastKwargs, send_to_device
from torch import Tensor, nn

from offload_trainer.device import ranks
from offload_trainer.errors import UserError
from offload_trainer.groups.slicing import named_tensors, with_tensors

MetricsFn = Callable[[nn.Module, Any], Mapping[str, Tensor]]
UNCACHED = AutocastKwargs(cache_enabled=False)
"""Autocast keeps what it has narrowed until it ends: of a master that passes through the device, all of it."""


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Sequence[Any],
    metrics_fn: MetricsFn,
    count: Callable[[Any], int],
    accelerator: Accelerator,
    parts: Callable[[Any], Iterable[Any]] = lambda batch: [batch],
) -> dict[str, float]:
    """Means of the metrics over the batches, weighted by `count`; each rank takes its share of the batches.

    parts: what a batch is divided into, to be taken one after the other.
    """
    training = module.training
    module.eval()
    sums: dict[str, float] = {}
    total = 0
    for i in range(accelerator.process_index, len(batches), accelerator.num_processes):
        for part in parts(batches[i]):
            part = send_to_device(part, accelerator.device)
            weight = count(part)
            if not weight:  # means over nothing are no numbers
                continue
            with accelerator.autocast(UNCACHED):
                metrics = metrics_fn(module, part)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) * weight
            total += weight
    module.train(training)
    every = ranks.gather(accelerator, (sums, total))  # a rank without a batch has no sums
    names = dict.fromkeys(name for part, _ in every for name in part)
    weight = sum(share for _, share in every)
    if not weight:
        raise UserError(f"validation: its {len(batches)} batches hold no rows to take a mean over")
    return {name: sum(part.get(name, 0.0) for part, _ in every) / weight for name in names}


def evaluate_full(
    model: nn.Module,
    batches: Sequence[Any],
    metrics_fn: MetricsFn,
    count: Callable[[Any], int],
    accelerator: Accelerator,
    parts: Callable[[Any], Iterable[Any]] = lambda batch: [batch],
) -> dict[str, float]:
    """`evaluate` of the master itself, which may be larger than the device."""
    with streamed(model, accelerator) as module:
        return evaluate(module, batches, metrics_fn, count, accelerator, parts)


@contextmanager
def streamed(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    """Context: the master as a module that runs on the device, through which one layer at a time passes.

    On a CPU it is the model itself. Weights stored in bfloat16 are computed with under autocast.
    """
    module = model
    if accelerator.device.type != "cpu":
        # Hooks replace the parameters of what they are attached to, so they get a copy that shares the master's memory.
        module = with_tensors(model, {name: tensor.detach() for name, tensor in named_tensors(model).items()})
        cpu_offload(module, accelerator.device)
    with computing_narrow(model, accelerator):
        yield module


def computing_narrow(model: nn.Module, accelerator: Accelerator) -> AbstractContextManager[object]:
    """Context: autocast to bfloat16 where weights are stored so, as the run's own else."""
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        return torch.autocast(accelerator.device.type, torch.bfloat16, cache_enabled=False)
    return accelerator.autocast(UNCACHED)
