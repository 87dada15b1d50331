"""Does it hurt to resample the subnetwork every K steps only (Section D), on images and on text?

Everything but K is the same: steps, data, seeds. The paper compares the two subnetworks in every step (J = K). Here
they are compared on about a twelfth of a round's batches, at least on one, so a run sees about as many pairs at any K
of 10 and more, and s moves once a round.
"""

import argparse
import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.records import Record, Setting
from benchmarks.storage import MODEL

from reproduction.pictures import new_figure, save
from reproduction.runs import AS_PUBLISHED, Run, finish

QUANTILES = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% of Student's t with 1, 2, … degrees of freedom."""
TASKS = ("image", "text")
QUICK: dict[str, Any] = {"intervals": [1, 2], "seeds": [0], "image_steps": 2, "text_steps": 2, "width": 0.125}
QUICK_KEYS = ["--structure.result_batches", "1"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/cifar10", help="of the images (default: data/cifar10)")
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 10, 50, 200], metavar="K")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--image-steps", type=int, default=58_600, help="of 256 images (default: 300 epochs)")
    parser.add_argument("--text-steps", type=int, default=10_000, help="of 1,024 bytes (default: 10,000)")
    parser.add_argument("--width", type=float, default=2.0, help="of ResNet-32's channels (default: 2, the paper's)")


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[Record]:
    for task in options.tasks:
        for seed in options.seeds:  # a whole comparison for each seed
            first: Run | None = None
            for every in options.intervals:
                run = train(setting, options, task, every, seed)
                first = first or run
                yield _record(setting, options, task, every, seed, run, first)


def train(setting: Setting, options: argparse.Namespace, task: str, every: int, seed: int) -> Run:
    steps = options.image_steps if task == "image" else options.text_steps
    arguments: list[object] = ["--steps", steps, "--seed", seed, "--sync_every", every]
    arguments += ["--structure.paired_batches", max(1, every // 12), "--track.display", "plain"]
    arguments += ["--track.log_every", max(1, steps // 50), "--checkpoint.every", max(1, steps // 4)]
    if task == "image":
        arguments += ["--task.data", options.data, "--task.width", options.width, *AS_PUBLISHED]
        arguments += ["--task.limit", 16, "--task.batch_size", 4] if setting.quick else []
    else:
        arguments += ["--task.model", json.dumps(MODEL), "--task.sequence", 128, "--task.batch_size", 8]
        arguments += ["--task.val_batches", 2 if setting.quick else 40, "--structure.settle", 0]
    config = {"image": "resnet32_cifar10", "text": "quickstart"}[task]
    passed_on = [*options.of_structure, *options.passed_on]
    return finish(options.out / f"{task}-{every}-seed-{seed}", config, [*arguments, *passed_on])


def _record(
    setting: Setting, options: argparse.Namespace, task: str, every: int, seed: int, run: Run, first: Run
) -> Record:
    size = {
        "image": f"ResNet-32 width {options.width:g}, {options.image_steps} steps",
        "text": f"Llama, {options.text_steps} steps",
    }[task]
    value, against = (one.summary["exported"]["accuracy" if task == "image" else "loss"] for one in (run, first))
    if task == "image":
        value, against = 100 * value, 100 * against
    return setting.record(
        "interval",
        f"{size}, K={every}, seed {seed}",
        value,
        "% accuracy" if task == "image" else "nats per byte",
        value / against,
        f"K={options.intervals[0]}, same seed",
        repeats=1,
        against_value=against,
        task=task,
        size=size,
        every=every,
        seed=seed,
        train_minutes=run.seconds / 60,
        transfers=run.summary["transfers"],
        settings=run.settings,
        arguments=[*options.of_structure, *options.passed_on],
        tool="tools/reproduce.py interval",
        command=options.command,
    )


def confidence(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval by Student's t; NaN of a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return mean(values), QUANTILES[min(len(values) - 1, len(QUANTILES)) - 1] * stdev(values) / len(values) ** 0.5


def summarised(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Size, unit, and for each K mean and spread over the seeds, and those of the difference to the first K."""
    for size, found in groupby(sorted(records, key=_order), lambda r: r["details"]["size"]):
        group, rows = list(found), []
        for every, same in groupby(group, lambda r: r["details"]["every"]):
            runs = list(same)
            level = confidence([run["value"] for run in runs])
            change = confidence([run["value"] - run["details"]["against_value"] for run in runs])
            minutes = mean(run["details"]["train_minutes"] for run in runs)
            rows.append({"every": every, "level": level, "change": change, "minutes": minutes, "seeds": len(runs)})
        yield size, group[0]["unit"], rows


def _order(record: dict[str, Any]) -> tuple[str, int, int]:
    return record["details"]["size"], record["details"]["every"], record["details"]["seed"]


def draw(records: list[dict[str, Any]], file: Path) -> None:
    found = list(summarised(records))
    figure, grid = new_figure(1, len(found), (4.2 * len(found), 3.6))
    for axes, (size, unit, rows) in zip([grid] if len(found) == 1 else grid, found, strict=True):
        means, half = zip(*(row["level"] for row in rows), strict=True)
        every = [row["every"] for row in rows]
        axes.errorbar(every, means, [0 if math.isnan(h) else h for h in half], marker="o", capsize=4)
        axes.set(xlabel="steps between two samplings, K", ylabel=unit, title=size, xscale="log", xticks=every)
        axes.set_xticklabels(every)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    save(figure, file)


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, for README."""
    yield "| run | K | result, mean of the seeds ± 95% | against the first K | training | seeds |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for size, unit, found in summarised(records):
        for row in found:
            level, change = (_shown(*row[key]) for key in ("level", "change"))
            yield f"| {size} | {row['every']} | {level} {unit} | {change} | {row['minutes']:.1f} min | {row['seeds']} |"


def _shown(value: float, half: float) -> str:
    return f"{value:.4g}" + ("" if math.isnan(half) else f" ± {half:.2g}")
