"""The paper's Figure 4: E L², V(s) and V_max(s) through the training of ResNet-32.

With m and m′ drawn independently from s, and both losses of the same batch and weights:
E L² is the mean of L(m)², what the variance of plain policy gradients grows with; V(s) that of (L(m) − L(m′))², with
which the variance of VR-PGE grows; V_max(s) the largest, over all units i and both values of m_i, of the mean of
(L(m) − L(m′))² given m_i, which bounds what each unit's share of it can be (this project's reading of the appendix;
estimated as the largest of as many noisy means as there are units, so from above, and only where at least `SEEN` masks
have m_i so: of a unit that is nearly certain, one mask without it would decide).
Property 1: V(s) is far below E L². Property 2: V_max(s) is close to V(s).

The run keeps its checkpoints; the masks are drawn and evaluated afterwards, from each of them.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from accelerate.utils import send_to_device
from benchmarks.records import Record, Setting
from torch import Tensor

from offload_trainer.config import Config, parse
from offload_trainer.groups import Plan, find_groups
from offload_trainer.groups.slicing import slice_module
from offload_trainer.making import make_structure
from offload_trainer.master import find_checkpoint
from offload_trainer.tasks import build_task
from reproduction.pictures import new_figure, save
from reproduction.runs import AS_PUBLISHED, ROOT, SHORT, finish

QUANTITIES = {"losses": "E L²", "pairs": "V(s)", "largest": "V_max(s)"}
SEEN = 40
"""Of the masks drawn at a moment, of which there are two for each pair; a tenth of them where they are few."""
QUICK: dict[str, Any] = {"steps": 4, "points": 2, "pairs": 6}
QUICK_KEYS = [*SHORT, "--task.width", "0.25"]


@dataclass(frozen=True)
class Point:
    """At one moment of the run, in nats squared."""

    losses: float
    pairs: float
    largest: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/cifar10", help="as task.data of a config (default: data/cifar10)")
    parser.add_argument("--steps", type=int, default=58_600, help="of 256 images (default: 300 epochs)")
    parser.add_argument("--points", type=int, default=10, help="moments of the run to look at")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of masks at each, a batch for each pair")
    parser.add_argument("--seed", type=int, default=0)


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[Record]:
    steps, points = options.steps, options.points
    arguments = ["--steps", steps, "--seed", options.seed, "--task.data", options.data, *AS_PUBLISHED]
    arguments += ["--checkpoint.every", max(1, steps // points), "--checkpoint.keep_last", 10**6]
    arguments += [
        "--track.display",
        "plain",
        "--track.log_every",
        max(1, steps // 100),
        *options.of_structure,
        *options.passed_on,
    ]
    out = options.out / f"steps-{steps}-seed-{options.seed}"
    run = finish(out, "resnet32_cifar10", arguments, keep_checkpoints=True)
    command = ["--config", ROOT / "configs" / "resnet32_cifar10.yaml", "--out", run.out, *arguments]
    config = parse([str(word) for word in command])
    found = dict(observed(setting, config, run.out, options.pairs))
    factors = {
        "E L² ÷ V": geometric_mean(point.losses / point.pairs for point in found.values()),
        "V_max ÷ V": geometric_mean(point.largest / point.pairs for point in found.values()),
    }
    for step, point in found.items():
        yield setting.record(
            "figure4",
            f"width {config.task.width:g}, {steps} steps, at step {step}",  # type: ignore[union-attr]
            point.pairs,
            "nats², V(s)",
            point.losses / point.pairs,
            "E L²",
            repeats=options.pairs,
            against_value=point.losses,
            step=step,
            steps=steps,
            seed=options.seed,
            losses=point.losses,
            pairs=point.pairs,
            largest=point.largest,
            factors=factors,
            settings=run.settings,
            arguments=[*options.of_structure, *options.passed_on],
            tool="tools/reproduce.py figure4",
            command=options.command,
        )


def observed(setting: Setting, config: Config, out: Path, pairs: int) -> Iterator[tuple[int, Point]]:
    """Optimizer step → what pairs of masks show at the checkpoint of that step."""
    task = build_task(config.task, config.seed)
    groups = find_groups(task.model, task.example_inputs, widths=task.widths)
    structure = make_structure(config, groups)
    model = task.model.to_empty(device="cpu")
    device = setting.device
    for folder in sorted((out / "checkpoints").glob("step-*")):
        checkpoint = find_checkpoint(folder)
        model.load_state_dict(checkpoint.read("weights"))
        structure.load_state_dict(checkpoint.read("structure"))
        losses, masks = torch.empty(pairs, 2), torch.empty(pairs, 2, structure.flat.numel(), dtype=torch.bool)
        for i in range(pairs):
            batch = send_to_device(task.train[config.steps + i], device)  # of training images, none that was a step's
            for j, kept in enumerate(structure.pair()):
                subnet = slice_module(model, Plan(groups, kept), groups).to(device)
                with torch.no_grad():
                    losses[i, j] = task.loss_fn(subnet.train(), batch).cpu()
                masks[i, j] = torch.cat([_mask(kept[name], len(s)) for name, s in structure.s.items()])
        yield checkpoint.meta["step"], point(losses.double(), masks)


def point(losses: Tensor, masks: Tensor) -> Point:
    """losses: (pairs, 2), of m and m′; masks: (pairs, 2, units). The two of a pair may change places, so each counts
    as the one that is conditioned on."""
    squares = (losses[:, 0] - losses[:, 1]).square().repeat_interleave(2)  # of each mask
    kept = masks.flatten(0, 1).double()  # (2 pairs, units)
    least = min(SEEN, len(kept) / 10)
    means = [((squares @ share) / share.sum(0))[share.sum(0) >= least] for share in (kept, 1 - kept)]
    largest = torch.cat(means).max()
    return Point(losses.square().mean().item(), squares.mean().item(), largest.item())


def _mask(kept: Tensor, units: int) -> Tensor:
    return torch.zeros(units, dtype=torch.bool).index_fill(0, kept, True)


def draw(records: list[dict[str, Any]], file: Path) -> None:
    figure, axes = new_figure()
    sizes = list(dict.fromkeys(_size(record) for record in records))
    for size, style in zip(sizes, ("-", "--", ":", "-.") * len(sizes), strict=False):
        chosen = [record["details"] for record in records if _size(record) == size]
        for i, (key, name) in enumerate(QUANTITIES.items()):
            label = f"{name}, {size}"
            axes.plot([d["step"] for d in chosen], [d[key] for d in chosen], f"C{i}{style}", marker=".", label=label)
    axes.set(xlabel="optimizer step", ylabel="nats²", yscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    save(figure, file)


def _size(record: dict[str, Any]) -> str:
    return record["case"].partition(", at step")[0]


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, for README."""
    yield "| run | step | E L² | V(s) | V_max(s) | E L² ÷ V | V_max ÷ V |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for record in records:
        d = record["details"]
        yield (
            f"| {_size(record)} | {d['step']:,} | {d['losses']:.4g} | {d['pairs']:.3g} | {d['largest']:.3g} "
            f"| {d['losses'] / d['pairs']:.3g} | {d['largest'] / d['pairs']:.3g} |"
        )
