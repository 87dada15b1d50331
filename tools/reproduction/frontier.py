"""Validation loss against device memory and time: small dense networks, ours from wider masters, simple baselines.

All see the same batches for as many steps. "dense ×1" is the small network that fits; "ours ×4" a master four times as
wide whose subnets are as large as that. "random fixed" trains one random subnet of the wide master throughout, "grown"
keeps the units of the largest weights and tries others for a tenth. The gap is ours − dense ×1, of the same seed.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.records import Record, Setting

from reproduction.contest import QUICK as SHORT_RUNS
from reproduction.contest import QUICK_KEYS as QUICK_KEYS
from reproduction.contest import TIMES, Contender, by_contender, contest
from reproduction.contest import add_arguments as add_arguments
from reproduction.interval import confidence
from reproduction.pictures import new_figure, save

CONTENDERS = [
    Contender("dense ×1", 1, None),
    Contender("dense ×½", 0.5, None),
    Contender("dense ×2", 2, None),
    Contender(f"dense ×{TIMES} (the full network)", TIMES, None),
    *(Contender(f"ours ×{times}", times, []) for times in (2, 4, 8)),
    Contender(f"ours ×{TIMES}, exploring until 4/5", TIMES, ["--structure.settle", 0.2]),
    Contender("random fixed", TIMES, ["--structure.settle", 1]),
    Contender("grown", TIMES, ["--structure.estimator", "magnitude"]),
]
QUICK: dict[str, Any] = {**SHORT_RUNS, "only": ["ours ×2", "grown"], "width": 0.0625}


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[Record]:
    yield from contest(setting, options, "frontier", CONTENDERS)


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """For each task the final loss over device bytes, and the loss over time."""
    sizes = list(dict.fromkeys(r["details"]["size"] for r in records))
    figure, grid = new_figure(len(sizes), 2, (10, 3.9 * len(sizes)), squeeze=False)
    names = list(dict.fromkeys(r["details"]["contender"] for r in records))
    for (left, right), size in zip(grid, sizes, strict=True):
        for where, name, found in by_contender(records):
            if where != size:
                continue
            colour, dense = f"C{names.index(name) % 10}", name.startswith("dense")
            bytes_ = [r["details"]["device_bytes"] / 2**20 for r in found]
            left.plot(bytes_, [r["value"] for r in found], "os"[dense], color=colour, label=name)
            for i, record in enumerate(found):
                points = [p for p in record["details"]["curve"] if p[0]] or [(0, 0.0, record["value"])]
                minutes, losses = [p[1] / 60 for p in points], [p[2] for p in points]
                minutes.append(record["details"]["seconds"] / 60)
                losses.append(record["value"])
                right.plot(minutes, losses, "--" if dense else "-", color=colour, lw=1, label=None if i else name)
        left.set(xlabel="device memory, MiB", ylabel=found_unit(records, size), title=size)
        right.set(xlabel="training time, minutes")
        left.legend(frameon=False, fontsize=7)
        for axes in (left, right):
            axes.grid(alpha=0.3, which="both")
    save(figure, file)


def found_unit(records: list[dict[str, Any]], size: str) -> str:
    return next(r["unit"] for r in records if r["details"]["size"] == size)


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, for README; times are multiples of that of dense ×1."""
    yield "| run | contender | loss | accuracy | gap to dense ×1 | device | time | trained / master | seeds |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for size, name, found in by_contender(records):
        gap, half = confidence([r["value"] - r["details"]["against_value"] for r in found])
        details = [r["details"] for r in found]
        spread = f" ± {half:.3f}" if half == half else ""
        yield (
            f"| {size} | {name} | {mean(r['value'] for r in found):.4f} "
            f"| {mean(d['accuracy'] for d in details):.1%} | {gap:+.4f}{spread} "
            f"| {mean(d['device_bytes'] for d in details) / 2**20:.1f} MiB "
            f"| {mean(d['time'] for d in details):.2f} "
            f"| {details[0]['parameters'] / 1e6:.2f} / {details[0]['master_parameters'] / 1e6:.2f} M | {len(found)} |"
        )
