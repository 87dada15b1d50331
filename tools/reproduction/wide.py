"""A master many times as wide as the subnetwork that fits: channel ratios far below the paper's (its third point).

Against the same small network trained alone, for as many steps on the same data: quality, time and memory. "unscaled"
is ours with the initial weights of the wide network, too small for a narrow one. The whole wide network is trained if
`--whole` asks for it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.records import Record, Setting

from reproduction.pictures import new_figure, save
from reproduction.runs import SHORT, WHOLE, Run, finish
from reproduction.table5 import CONFIGS

QUICK: dict[str, Any] = {"width": 0.0625, "times": 4, "steps": 4}
QUICK_KEYS = SHORT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/cifar10", help="as task.data of a config (default: data/cifar10)")
    parser.add_argument("--model", choices=CONFIGS, default="vgg19")
    parser.add_argument("--width", type=float, default=1.0, help="of the network that fits (default: 1)")
    parser.add_argument("--times", type=float, default=16, help="as wide is the master (default: 16)")
    parser.add_argument("--steps", type=int, default=58_600, help="of 256 images (default: 300 epochs)")
    parser.add_argument("--whole", action="store_true", help="train the whole wide network too")
    parser.add_argument("--seed", type=int, default=0)


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[Record]:
    wide = options.width * options.times
    sparse = ["--structure.keep", 1 / options.times, *options.of_structure]
    runs = {
        "small": train(options, "small", options.width, WHOLE),
        "ours": train(options, "ours", wide, sparse),
        "unscaled": train(options, "unscaled", wide, [*sparse, "--structure.rescale", "false"]),
    }
    if options.whole:
        runs["whole"] = train(options, "whole", wide, WHOLE)
    for name, run in runs.items():
        measured, small = run.summary["ledger"]["measured"], runs["small"]
        yield setting.record(
            "wide",
            f"{options.model}, width {options.width:g}, {options.times:g} times, {options.steps} steps, {name}",
            100 * run.summary["exported"]["accuracy"],
            "% accuracy",
            run.seconds / small.seconds,
            "seconds of the small network trained alone",
            repeats=1,
            against_value=small.seconds,
            contender=name,
            parameters=run.parameters,
            master_parameters=run.full_parameters,
            device_bytes=run.device_bytes,
            host_bytes=measured["host_peak_bytes"],
            seconds=run.seconds,
            transfers=run.summary["transfers"],
            curve=[(r["train_seconds"], r["val_accuracy"]) for r in run.metrics if "val_accuracy" in r],
            settings=run.settings,
            arguments=[*options.of_structure, *options.passed_on],
            tool="tools/reproduce.py wide",
            command=options.command,
        )


def train(options: argparse.Namespace, name: str, width: float, structure: list[Any]) -> Run:
    steps = options.steps
    arguments = ["--steps", steps, "--seed", options.seed, "--task.data", options.data, "--task.width", width]
    arguments += ["--track.log_every", max(1, steps // 100), "--track.eval_every", max(1, steps // 10)]
    arguments += ["--checkpoint.every", max(1, steps // 5), "--track.display", "plain", *structure, *options.passed_on]
    return finish(options.out / f"{options.model}-{name}-seed-{options.seed}", CONFIGS[options.model], arguments)


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Validation accuracy over training time."""
    figure, axes = new_figure()
    for record in records:
        curve = record["details"]["curve"]
        if curve:
            seconds, accuracy = zip(*curve, strict=True)
            axes.plot([s / 60 for s in seconds], [100 * a for a in accuracy], marker=".", label=record["case"])
    axes.set(xlabel="training time, minutes", ylabel="accuracy, %")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    save(figure, file)


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, for README."""
    yield "| run | accuracy | time ÷ small | trained | master | device | host peak |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for record in records:
        d = record["details"]
        yield (
            f"| {record['case']} | {record['value']:.2f}% | {record['ratio']:.2f} | {d['parameters'] / 1e6:.2f} M "
            f"| {d['master_parameters'] / 1e6:.1f} M | {d['device_bytes'] / 2**20:.1f} MiB "
            f"| {d['host_bytes'] / 2**20:,.0f} MiB |"
        )
