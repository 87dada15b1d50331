"""What validation keeps while the master passes through the device."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from offload_trainer.batches import pieces
from offload_trainer.evaluation import evaluate_full, streamed
from offload_trainer.forecast.footprint import LiveBytes, forward_footprint, skeleton
from offload_trainer.groups import Groups, Plan
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.result import recalibrate_master

CPU = torch.device("cpu")


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))


def metrics(module: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    return {"loss": module(batch).float().square().mean()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "stored narrow"])
def test_a_pass_keeps_no_narrow_copies_of_weights(dtype: torch.dtype) -> None:
    """Which would be the whole master, on a device that it does not fit."""
    model = deep().to(dtype)
    accelerator = Accelerator(mixed_precision="bf16" if dtype == torch.float32 else "no", cpu=True)
    batches = [torch.ones(2, 64) for _ in range(3)]
    layer = 64 * 64 * 2
    with LiveBytes(named_tensors(model).values()) as live:
        evaluate_full(model, batches, metrics, len, accelerator)
    assert live.peak < 3 * layer
    with streamed(model, accelerator) as module, LiveBytes(named_tensors(model).values()) as live, torch.no_grad():
        module(batches[0])  # as importance is measured
    assert live.peak < 3 * layer


def test_the_ledger_counts_none_either() -> None:
    model = deep()
    plan = Plan.whole(Groups((), {name: t.shape for name, t in model.named_parameters()}))
    told = forward_footprint(skeleton(model, plan, CPU), metrics, torch.ones(2, 64), autocast=True)
    assert told.peak < 3 * 64 * 64 * 2


def test_parts_of_batches_give_the_same_means() -> None:
    torch.manual_seed(0)
    model, batches = deep(), [torch.randn(5, 64), torch.randn(2, 64)]
    accelerator, seen = Accelerator(cpu=True), list[int]()

    def noted(module: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        seen.append(len(batch))
        return metrics(module, batch)

    whole = evaluate_full(model, batches, metrics, len, accelerator)
    parts = evaluate_full(model, batches, noted, len, accelerator, lambda batch: pieces(batch, 2))
    assert seen == [2, 2, 1, 2]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_the_masters_batchnorm_gets_statistics_of_its_own() -> None:
    """Those that subnets left behind are of other inputs: the mean over the batches replaces them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    norm = model[1]
    norm.running_var.fill_(1e-9)
    batches = [torch.randn(4, 3, 5, 5) * (1 + i) for i in range(3)]
    recalibrate_master(model, batches, lambda module, batch: module(batch).mean(), Accelerator(cpu=True))
    with torch.no_grad():
        seen = [model[0](batch) for batch in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert norm.momentum == 0.1


def test_a_batch_without_rows_counts_nothing() -> None:
    """Its mean is not a number."""
    model, batches = deep(), [torch.randn(5, 64), torch.randn(0, 64)]
    means = [evaluate_full(model, part, metrics, len, Accelerator(cpu=True)) for part in (batches, batches[:1])]
    assert means[0] == means[1] and math.isfinite(means[0]["loss"])
