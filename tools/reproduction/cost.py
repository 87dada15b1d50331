"""Train cost of one step, as the paper's Section C.1 accounts for it, counted and timed.

With f_D and f_S the forward of the dense network and of the subnet, and a backward of twice a forward, dense training
costs 3 f_D. Times as cheap are then: GrowEfficient, whose backward is dense, 3/(2 + f_S/f_D), less than 3/2; the
paper's method, with two forwards of subnets in every step, 3/(4 f_S/f_D); and this one, which compares them in J steps
of K, 3/((3 + J/K) f_S/f_D). Beside these: the multiplications that torch counts, and the time that it takes.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from benchmarks.records import Record, Setting
from benchmarks.timing import take_turns
from benchmarks.workloads import CLASSES, vision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from offload_trainer.groups import Plan, random_plan
from offload_trainer.groups.slicing import slice_module
from reproduction.pictures import new_figure, save

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = ("vgg19_cifar10", "resnet32_cifar10", "wrn28_10_cifar10", "resnet50_imagenet")
BATCH = {"resnet50": 8, "wrn28_10": 8}
PAIRS = 4
"""In a round, of what is accounted for. (A run's default is one, which costs less.)"""
"""Images; 64 for the others."""
QUICK: dict[str, Any] = {"configs": ["vgg19_cifar10"], "keep": [0.5], "repeats": 1}
QUICK_KEYS: list[str] = []


@dataclass(frozen=True)
class Cost:
    """Of one step, in any unit."""

    dense_forward: float
    dense_backward: float
    sparse_forward: float
    sparse_backward: float

    def times_as_cheap(self, pairs: float) -> dict[str, float]:
        """Against dense training, by method. pairs: J/K."""
        dense = self.dense_forward + self.dense_backward
        return {
            "GrowEfficient": dense / (self.sparse_forward + self.dense_backward),
            "paper": dense / (2 * self.sparse_forward + self.sparse_backward),
            "ours": dense / ((1 + pairs) * self.sparse_forward + self.sparse_backward),
        }


def formulas(share: float, pairs: float) -> dict[str, float]:
    """Section C.1's, of share = f_S/f_D; and ours, of J/K as well."""
    return {"GrowEfficient": 3 / (2 + share), "paper": 3 / (4 * share), "ours": 3 / ((3 + pairs) * share)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--configs", nargs="+", choices=SHIPPED, default=list(SHIPPED))


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[Record]:
    """Of every shipped network, at each keep ratio of all its groups."""
    for config in options.configs:
        tree = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
        task, every = tree["task"], tree["sync_every"]
        pairs = tree["structure"].get("paired_batches", PAIRS) / every
        image = task.get("image_size", 32)
        batch = 2 if setting.quick else BATCH.get(task["model"], 64) * (4 if setting.device.type == "cuda" else 1)
        width = 0.125 if setting.quick else task.get("width", 1.0)
        workload = vision(task["model"], width=width, batch=batch, image=image)
        torch.manual_seed(0)
        dense = workload.build()
        groups = workload.groups(dense)
        for keep in options.keep:
            plan: Plan = random_plan(groups, torch.Generator().manual_seed(0), keep)
            pair = {"dense": dense, "sparse": slice_module(dense, plan, groups)}
            images = torch.randn(batch, 3, image, image).to(setting.device, memory_format=torch.channels_last)
            labels = torch.randint(CLASSES, (batch,)).to(setting.device)
            flops = _cost(pair, partial(counted, images=images, labels=labels))
            seconds = timed(setting, pair, images, labels, options.repeats)
            share = flops.sparse_forward / flops.dense_forward
            by = {
                "formula": formulas(share, pairs),
                "FLOPs": flops.times_as_cheap(pairs),
                "time": seconds.times_as_cheap(pairs),
            }
            yield setting.record(
                "cost",
                f"{task['model']} keep {keep:g}",
                1e3 * ((1 + pairs) * seconds.sparse_forward + seconds.sparse_backward),
                "ms per step",
                by["time"]["ours"],
                "dense training",
                repeats=options.repeats,
                against_value=1e3 * (seconds.dense_forward + seconds.dense_backward),
                batch=batch,
                width=width,
                pairs=pairs,
                share=share,
                flops=asdict(flops),
                seconds=asdict(seconds),
                times_as_cheap=by,
                tool="tools/reproduce.py cost",
                command=options.command,
            )


def _cost(pair: dict[str, nn.Module], of: Callable[[nn.Module], tuple[float, float]]) -> Cost:
    return Cost(*of(pair["dense"]), *of(pair["sparse"]))


def counted(module: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Floating-point operations of a forward and of a backward, as torch counts those of matmuls and convolutions."""
    module = module.to(images.device).train()
    with FlopCounterMode(display=False) as forward:
        loss = cross_entropy(module(images), labels)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    module.zero_grad()
    return forward.get_total_flops(), backward.get_total_flops()


def timed(setting: Setting, pair: dict[str, nn.Module], images: Tensor, labels: Tensor, repeats: int) -> Cost:
    """Seconds, the dense network and the subnet taking turns."""
    losses: dict[str, Tensor] = {}

    def forward(name: str) -> None:
        with setting.accelerator.autocast():
            losses[name] = cross_entropy(pair[name](images).float(), labels)

    turns: dict[str, Callable[[], object]] = {}
    for name in pair:
        turns[f"{name} forward"] = partial(forward, name)
        turns[f"{name} backward"] = lambda name=name: losses.pop(name).backward()
    seconds = take_turns(turns, repeats, setting.device)
    return Cost(*(median(seconds[f"{name} {what}"]) for name in pair for what in ("forward", "backward")))


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Times as cheap as dense training: formulas as bars, what was counted and timed as marks."""
    figure, axes = new_figure(size=(9, 4.2))
    names = ("GrowEfficient", "paper", "ours")
    for i, record in enumerate(records):
        by = record["details"]["times_as_cheap"]
        for j, name in enumerate(names):
            at = i + (j - 1) * 0.27
            axes.bar(at, by["formula"][name], 0.25, color=f"C{j}", alpha=0.5, label=name if not i else None)
            for mark, how in (("_", "FLOPs"), ("o", "time")):
                axes.plot(at, by[how][name], f"k{mark}", ms=7, label=how if not i and not j else None)
    axes.axhline(1, color="0.6", lw=0.8)
    axes.set_xticks(range(len(records)), [r["case"].replace(" keep ", "\nρ = ") for r in records])
    axes.set(ylabel="times as cheap as dense training", yscale="log")
    figure.legend(loc="outside upper center", frameon=False, ncols=5)
    save(figure, file)


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, for README."""
    names = ("GrowEfficient", "paper", "ours")
    yield "| network | f_S/f_D | " + " | ".join(f"{name}: formula, FLOPs, time" for name in names) + " |"
    yield "| --- |" + " ---: |" * (1 + len(names))
    for record in records:
        d = record["details"]
        by = d["times_as_cheap"]
        cells = [", ".join(f"{by[how][name]:.3g}" for how in ("formula", "FLOPs", "time")) for name in names]
        yield f"| {record['case']} | {d['share']:.3f} | " + " | ".join(cells) + " |"
