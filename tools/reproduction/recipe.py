"""What each choice of the recipe is worth: one change at a time, loss after equal steps.

The base is a master four times as wide as its subnets. s starts polarised and follows credit; a tenth of a subnet
explores at first, ever less until a fifth of the run, and then the best subnet is trained alone ("random fixed": that
from the start). Every row changes one thing of it.
The gap is to the small dense network of the same seed.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.records import Record, Setting

from reproduction.contest import FIFTH, TIMES, Contender, by_contender, contest, small_llama
from reproduction.contest import QUICK as SHORT_RUNS
from reproduction.contest import QUICK_KEYS as QUICK_KEYS
from reproduction.contest import add_arguments as add_arguments
from reproduction.interval import confidence
from reproduction.pictures import new_figure, save

EXPLORING = (0.02, 0.05, 0.2, 0.4)
VARIANTS: dict[str, list[object]] = {
    "base: explore 0.1": [],
    **{f"explore {share:g}": ["--structure.explore", share] for share in EXPLORING},
    "s flat": ["--structure.start", "uniform"],
    "random fixed": ["--structure.settle", 1],
    "settle 0.5": ["--structure.settle", 0.5],
    "settle 0.2": ["--structure.settle", 0.2],
    "magnitude": ["--structure.estimator", "magnitude"],
    "rloo": ["--structure.estimator", "rloo"],
    "rloo, control linear": ["--structure.estimator", "rloo", "--structure.control", "linear"],
    "rloo, reference fresh": ["--structure.estimator", "rloo", "--structure.reference", "fresh"],
    "rloo, one paired batch": ["--structure.estimator", "rloo", "--structure.paired_batches", 1],
    "vr_pge": ["--structure.estimator", "vr_pge"],
    "disarm": ["--structure.estimator", "disarm"],
    "s stays random": ["--structure.estimator", "rloo", "--structure.lr", 0],
    "K=10": ["--sync_every", 10, "--structure.paired_batches", 1],
    "K=200": ["--sync_every", 200],
    "moments reset": ["--optimizer.state", "reset"],
    "ρ falls from a half": [
        *("--structure.schedule", "cubic", "--structure.start_keep", 0.5),
        *("--structure.schedule_steps", FIFTH),
    ],
}


def _sampled(groups: dict[str, float | None], **times: float) -> list[object]:
    """Keys of a Llama of other shapes, whose subnets are as large as the others'. None: a quarter."""
    keep: list[object] = [] if None in groups.values() else ["--structure.keep", "null"]
    return [*keep, "--task.model", json.dumps(small_llama(**times)), "--structure.groups", json.dumps(groups)]


OF_TEXT: dict[str, list[object]] = {
    "heads alone": _sampled({"*self_attn*": None}, heads=TIMES),
    "MLP features alone": _sampled({"*mlp*": None}, features=TIMES),
    "residual stream alone": _sampled({"residual": 0.5}, residual=2),
    "residual stream too": _sampled({"residual": 0.5, "*": None}, heads=TIMES, features=TIMES, residual=2),
}
"""Which groups are sampled."""
CONTENDERS = [
    Contender("dense ×1", 1, None),
    *(Contender(name, TIMES, keys) for name, keys in VARIANTS.items()),
    *(Contender(name, TIMES, keys, of_text=True) for name, keys in OF_TEXT.items()),
    Contender("outer momentum", TIMES, ["--memory.overlap", "false"], "outer momentum"),
    Contender("faster newcomers", TIMES, [], "faster newcomers"),
    Contender("taught", TIMES, [], "taught", of_text=True),
]
QUICK: dict[str, Any] = {
    **SHORT_RUNS,
    "only": ["base: explore 0.1", "rloo", "MLP features alone", "taught"],
    "width": 0.0625,
}


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[Record]:
    yield from contest(setting, options, "recipe", CONTENDERS)


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """What exploring costs: the gap over the share of units exchanged in a round."""
    shares = {"random fixed": 0.0, "base: explore 0.1": 0.1, **{f"explore {share:g}": share for share in EXPLORING}}
    figure, axes = new_figure()
    for size in dict.fromkeys(r["details"]["size"] for r in records):
        points = []
        for where, name, found in by_contender(records):
            if where == size and name in shares:
                gap = mean(100 * (r["value"] / r["details"]["against_value"] - 1) for r in found)
                points.append((shares[name], gap))
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=size)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(
        xlabel="share of a subnet's units that explore, and are exchanged in a round, at first",
        ylabel="loss above the small dense network's, %",
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    save(figure, file)


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, for README."""
    yield "| run | variant | loss | gap to dense ×1 | time ÷ dense ×1 | seeds |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for size, name, found in by_contender(records):
        gap, half = confidence([r["value"] - r["details"]["against_value"] for r in found])
        spread = f" ± {half:.3f}" if half == half else ""
        time = mean(r["details"]["time"] for r in found)
        loss = mean(r["value"] for r in found)
        yield f"| {size} | {name} | {loss:.4f} | {gap:+.4f}{spread} | {time:.2f} | {len(found)} |"
