"""The paper's Table 5: VGG-19 on CIFAR-10, dense and at five sizes; accuracy, time of both passes, speed-up.

Beside them ResNet-32 with doubled channels and WRN-28-10 at one size each (`--models`). The paper gives the share of
the parameters; here the keep ratio of every channel group is its square root, which leaves about that share.

ours: the config, with what is passed on.
fixed: the same widths, trained from the start as an ordinary small network: what choosing costs, or gains.
paper: the method as published, two forward passes in every step and a new pair of subnets for each; both are sliced.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.records import Record, Setting

from reproduction.pictures import new_figure, save
from reproduction.runs import AS_PUBLISHED, SHORT, WHOLE, Run, finish


@dataclass(frozen=True)
class Row:
    """Of the paper's table."""

    accuracy: float
    parameters: float
    """Share of the dense network's, 0 to 1."""
    faster: float
    """Dense time ÷ this one's, both passes."""

    @property
    def keep(self) -> float:
        return round(self.parameters**0.5, 4)


DENSE = 0.9384
PAPER = (
    Row(0.9346, 0.2371, 1.55),
    Row(0.9311, 0.1275, 2.09),
    Row(0.9223, 0.0669, 3.20),
    Row(0.9082, 0.0306, 4.50),
    Row(0.8797, 0.0080, 7.41),
)
CONFIGS = {"vgg19": "vgg19_cifar10", "resnet32": "resnet32_cifar10", "wrn28_10": "wrn28_10_cifar10"}
CHANNELS = {"resnet32": 2.0}
"""Width of the paper's networks, where it is not 1."""
EPOCHS = 300
OTHERS = (0.5,)
"""Keep ratios of the models that Table 5 has no rows of."""
CONTENDERS: dict[str, list[object]] = {
    "dense": WHOLE,
    "ours": [],
    "fixed": ["--structure.settle", 1],
    "paper": [
        *("--structure.estimator", "vr_pge", "--structure.control", "none", "--sync_every", 1),
        *("--structure.paired_batches", 1, "--structure.reference", "fresh", *AS_PUBLISHED),
        *("--structure.result", "top"),
    ],
}
"""Keys of each, after what is passed on."""
TELLING = 1.0
"""Epochs; after fewer an accuracy says nothing, and only times are shown."""
UNNAMED = ("dense", "ours")
"""In names of cases and folders."""
QUICK: dict[str, Any] = {
    **{"epochs": 1, "images": 12, "batch": 4, "width": 0.125},
    "contenders": ["ours", "fixed", "paper"],
}
QUICK_KEYS = SHORT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/cifar10", help="as task.data of a config (default: data/cifar10)")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=["vgg19"])
    parser.add_argument("--epochs", type=float, default=EPOCHS, help=f"of the training images (default: {EPOCHS})")
    parser.add_argument("--images", type=int, default=50_000, help="in an epoch, for smaller data")
    parser.add_argument("--width", type=float, help="factor on all channels (default: the config's)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS][1:], default=["ours"], help="beside dense")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[Record]:
    """A record for each model, size and seed."""
    for model in options.models:
        rows: tuple[Row | float, ...] = PAPER if model == "vgg19" else OTHERS
        for seed in options.seeds:
            dense = train(options, model, 1.0, seed, "dense")
            yield _record(setting, options, model, 1.0, seed, dense, dense, None, "dense")
            for row in rows[:: len(rows) - 1 or 1] if setting.quick else rows:
                paper = row if isinstance(row, Row) else None
                keep = paper.keep if paper else float(row)  # type: ignore[arg-type]
                for contender in options.contenders:
                    run = train(options, model, keep, seed, contender)
                    yield _record(setting, options, model, keep, seed, run, dense, paper, contender)


def train(options: argparse.Namespace, model: str, keep: float, seed: int, contender: str) -> Run:
    steps = max(2, round(options.epochs * options.images / options.batch))
    arguments = ["--steps", steps, "--seed", seed, "--task.data", options.data, "--task.batch_size", options.batch]
    arguments += ["--track.log_every", max(1, steps // 100), "--track.eval_every", max(1, steps // 10)]
    arguments += ["--checkpoint.every", max(1, steps // 5), "--track.display", "plain"]
    arguments += ["--task.width", options.width] if options.width else []
    arguments += [] if contender == "dense" else ["--structure.keep", keep, *options.of_structure]
    arguments += [*options.passed_on, *CONTENDERS[contender]]
    name = f"{model}-{keep:g}-seed-{seed}" + ("" if contender in UNNAMED else f"-{contender}")
    return finish(options.out / name, CONFIGS[model], arguments)


def _record(
    setting: Setting,
    options: argparse.Namespace,
    model: str,
    keep: float,
    seed: int,
    run: Run,
    dense: Run,
    paper: Row | None,
    contender: str,
) -> Record:
    exported = run.summary["exported"]
    took, against = (sum(one.passes.values()) for one in (run, dense))
    curve = [(r["step"], r["train_seconds"], r["val_accuracy"]) for r in run.metrics if "val_accuracy" in r]
    size = f"width {options.width or 'of the config'}, {options.epochs:g} epochs"
    return setting.record(
        "table5",
        f"{model}, {size}, keep {keep:g}, seed {seed}" + ("" if contender in UNNAMED else f", {contender}"),
        100 * exported["accuracy"],
        "% accuracy",
        against / took,
        "dense network, seconds of both passes",
        repeats=1,
        against_value=100 * dense.summary["exported"]["accuracy"],
        model=model,
        size=size,
        epochs=options.epochs,
        keep=keep,
        seed=seed,
        contender=contender,
        parameters=run.parameters,
        share=run.parameters / dense.parameters,
        forward_minutes=run.passes["forward"] / 60,
        backward_minutes=run.passes["backward"] / 60,
        train_minutes=run.seconds / 60,
        steps=run.summary["steps"],
        curve=curve,
        paper=paper and {"lost": 100 * (DENSE - paper.accuracy), "faster": paper.faster, "share": paper.parameters},
        settings=run.settings,
        arguments=[*options.of_structure, *options.passed_on],
        tool="tools/reproduce.py table5",
        command=options.command,
    )


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Accuracy lost against the dense network over the speed-up, ours and the paper's."""
    figure, axes = new_figure()
    told = [record for record in records if record["details"]["epochs"] >= TELLING]
    for size, found in groupby(_sized(told), key=lambda r: f"{r['details']['model']}, {r['details']['size']}"):
        points = [row for row in averaged(list(found)) if row["contender"] != "dense"]
        for contender, style in (("ours", "o-"), ("fixed", "s:"), ("paper", "^--")):
            chosen = [(point["faster"], point["lost"]) for point in points if point["contender"] == contender]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), style, label=f"{contender}: {size}")
    axes.plot(
        [row.faster for row in PAPER],
        [100 * (DENSE - row.accuracy) for row in PAPER],
        "k--x",
        label="reported in the paper",
    )
    axes.set(xlabel="times as fast as the dense network, both passes", ylabel="accuracy lost, points")
    figure.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    save(figure, file)


def _sized(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda r: (r["details"]["model"], r["details"]["size"], -r["details"]["keep"]))


def _reduced(model: str, size: str, epochs: float) -> str:
    """How much of the paper's size that is."""
    width = size.partition(",")[0].removeprefix("width ")
    share = 1.0 if width == "of the config" else float(width) / CHANNELS.get(model, 1.0)
    return f"{share:g} of the paper's channels, {epochs:g} of its {EPOCHS} epochs"


def averaged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds: a row for each contender and keep ratio, largest first."""
    names = list(CONTENDERS)

    def order(record: dict[str, Any]) -> tuple[int, float]:
        return names.index(record["details"]["contender"]), -record["details"]["keep"]

    rows = []
    for (number, keep), found in groupby(sorted(records, key=order), order):
        group = list(found)
        details = [record["details"] for record in group]
        accuracies = [record["value"] for record in group]
        rows.append(
            {
                "contender": names[number],
                "keep": -keep,
                "accuracy": mean(accuracies),
                "spread": stdev(accuracies) if len(group) > 1 else None,
                "lost": mean(record["details"]["against_value"] - record["value"] for record in group),
                "faster": mean(record["ratio"] for record in group),
                **{
                    key: mean(d[key] for d in details)
                    for key in ("share", "forward_minutes", "backward_minutes", "train_minutes")
                },
                "seeds": len(group),
                "paper": details[0]["paper"],
            }
        )
    return rows


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, for README."""
    for (model, size), found in groupby(_sized(records), lambda r: (r["details"]["model"], r["details"]["size"])):
        group = list(found)
        details = group[0]["details"]
        yield f"{model}, {_reduced(model, size, details['epochs'])}, {details['steps']:,} steps:"
        yield ""
        yield (
            "| contender | keep ρ | parameters | accuracy | lost | paper: lost | forward | backward | both "
            "| times as fast | paper: times | whole loop | seeds |"
        )
        yield "| --- |" + " ---: |" * 12
        for row in averaged(group):
            spread = "" if row["spread"] is None else f" ± {row['spread']:.2f}"
            paper, told = row["paper"], group[0]["details"]["epochs"] >= TELLING
            accuracy = f"{row['accuracy']:.2f}%{spread} | {row['lost']:.2f} " if told else " | "
            both = row["forward_minutes"] + row["backward_minutes"]
            yield (
                f"| {row['contender']} | {row['keep']:g} | {row['share']:.2%} "
                f"| {accuracy}"
                f"| {'' if paper is None else format(paper['lost'], '.2f')} | {row['forward_minutes']:.1f} min "
                f"| {row['backward_minutes']:.1f} min | {both:.1f} min | {row['faster']:.2f} "
                f"| {'' if paper is None else format(paper['faster'], '.2f')} | {row['train_minutes']:.1f} min "
                f"| {row['seeds']} |"
            )
        yield ""
