"""Runs that a small dense network and ours are compared in: same steps, batches and data, on text or on images."""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.records import Record, Setting

from offload_trainer.errors import UserError
from reproduction.runs import SHORT, WHOLE, Run, finish

CONFIGS = {"text": "quickstart", "image": "vgg19_cifar10"}
FIFTH = object()
"""Stands among keys for a fifth of the run's steps."""
TIMES = 4
"""As wide as the subnet is the master, where nothing else is said."""
QUICK: dict[str, Any] = {"text_steps": 4, "image_steps": 4, "seeds": [0]}
QUICK_KEYS: list[str] = []
TEXT_RATE = 1e-3
"""At which the small dense network ends best, of 0.4, 0.75, 1, 1.5 and 3 thousandths: at one that does not suit it,
anything that changes its course looks good."""
RECIPE: list[object] = [
    *("--structure.estimator", "credit", "--structure.start", "random", "--structure.explore", 0.1),
    *("--structure.settle", 0.8, "--structure.paired_batches", 4),
]
"""What every sparse run has, unless it says otherwise."""
SPARSE = {
    "text": ["--structure.groups", '{"*mlp*": null, "*self_attn*": null}'],
    "image": ["--structure.sampler", "fixed", "--structure.budget", "per_group", "--structure.result", "top"],
}


@dataclass(frozen=True)
class Contender:
    """A run of a contest."""

    name: str
    times: float
    """Its master is so many times as wide as the small dense network."""
    keys: Sequence[object] | None
    """Of the config, for a sparse one whose subnets are as large as that; None: the network is trained whole."""
    variant: str = ""
    """Of what no key asks for: see `variants`."""
    of_text: bool = False
    """It is of language models alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/cifar10", help="of the images (default: data/cifar10)")
    parser.add_argument("--tasks", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--text-steps", type=int, default=20_000, help="of 1,024 bytes (default: 20,000)")
    parser.add_argument("--image-steps", type=int, default=58_600, help="of --batch images (default: 58,600)")
    parser.add_argument("--batch", type=int, default=256, help="images in a batch (default: 256)")
    parser.add_argument("--width", type=float, default=0.25, help="of the small VGG-19's channels (default: 0.25)")
    parser.add_argument("--decay", type=float, help="weight decay of the images' runs (default: the config's)")
    parser.add_argument("--limit", type=int, help="images to train on (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the contenders, by name (x for ×, 0.5 for ½)")


def chosen(options: argparse.Namespace, contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders that `--only` names, the first one in any case: the others are compared with it.

    Raises `UserError` for a name that is none's.
    """
    wanted = {plain(name) for name in options.only or []}
    unknown = wanted - {plain(one.name) for one in contenders}
    if unknown:
        names = ", ".join(repr(one.name) for one in contenders)
        raise UserError(f"--only: no contender is called {min(unknown)!r}; there are {names}")
    return [one for i, one in enumerate(contenders) if not wanted or not i or plain(one.name) in wanted]


def plain(name: str) -> str:
    """A contender's name without what a keyboard or a file system lacks."""
    return re.sub(r"[^\w.=]+", "-", name.replace("×", "x").replace("½", "0.5")).strip("-")


def train(setting: Setting, options: argparse.Namespace, task: str, one: Contender, seed: int) -> Run:
    steps = options.text_steps if task == "text" else options.image_steps
    arguments: list[object] = ["--steps", steps, "--seed", seed, "--track.display", "plain"]
    arguments += ["--track.log_every", max(1, steps // 100), "--track.eval_every", max(1, steps // 20)]
    arguments += ["--checkpoint.every", max(1, steps // 4)]
    if task == "text":
        arguments += [
            "--task.model",
            json.dumps(small_llama(one.times, one.times)),
            "--task.sequence",
            128,
            "--task.batch_size",
            8,
        ]
        arguments += ["--task.val_batches", 1 if setting.quick else 40, "--optimizer.lr", TEXT_RATE]
    else:
        arguments += ["--task.data", options.data, "--task.width", options.width * one.times]
        arguments += ["--task.batch_size", options.batch]
        arguments += ["--task.limit", options.limit] if options.limit else []
        arguments += ["--optimizer.weight_decay", options.decay] if options.decay is not None else []
        arguments += SHORT if setting.quick else []
    if one.keys is None:
        arguments += WHOLE
    else:
        short = ["--sync_every", 2, "--structure.paired_batches", 1] if setting.quick else []
        keys = [*SPARSE[task], *RECIPE, *short, *(max(1, steps // 5) if key is FIFTH else key for key in one.keys)]
        arguments += ["--structure.keep", 1 / one.times, *keys, *options.of_structure]
    folder = options.out / task / f"{plain(one.name)}-seed-{seed}"
    return finish(folder, CONFIGS[task], [*arguments, *options.passed_on], variant=one.variant)


def small_llama(heads: float = 1, features: float = 1, residual: float = 1) -> dict[str, Any]:
    """Config of the small network, or of one so many times as wide."""
    count = round(4 * heads)
    sizes = {"num_attention_heads": count, "num_key_value_heads": count // 2}
    sizes |= {"intermediate_size": round(256 * features), "hidden_size": round(128 * residual)}
    fixed = {"vocab_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    return {"model_type": "llama", **fixed, **sizes, "max_position_embeddings": 128, "tie_word_embeddings": True}


def contest(
    setting: Setting, options: argparse.Namespace, name: str, contenders: Sequence[Contender]
) -> Iterator[Record]:
    """A record of every contender, task and seed, against the first of the same task and seed."""
    wanted = chosen(options, contenders)
    for task in options.tasks:
        steps = options.text_steps if task == "text" else options.image_steps
        size = f"Llama, {steps} steps" if task == "text" else f"VGG-19 width {options.width:g}, {steps} steps"
        if task == "image":
            size += f", {options.limit} images" if options.limit else ""
            size += f", weight decay {options.decay:g}" if options.decay is not None else ""
        for seed in options.seeds:
            first: Run | None = None
            for one in wanted:
                if one.of_text and task != "text":
                    continue
                run = train(setting, options, task, one, seed)
                first = first or run
                exported, against = run.summary["exported"], first.summary["exported"]["loss"]
                yield setting.record(
                    name,
                    f"{size}, {one.name}, seed {seed}",
                    exported["loss"],
                    "nats per byte" if task == "text" else "nats per image",
                    exported["loss"] / against,
                    contenders[0].name,
                    repeats=1,
                    against_value=against,
                    task=task,
                    size=size,
                    contender=one.name,
                    times=one.times,
                    seed=seed,
                    accuracy=exported["accuracy"],
                    parameters=run.parameters,
                    master_parameters=run.full_parameters,
                    device_bytes=run.device_bytes,
                    seconds=run.seconds,
                    time=run.seconds / first.seconds,
                    curve=[(r["step"], r["train_seconds"], r["val_loss"]) for r in run.metrics if "val_loss" in r],
                    settings=run.settings,
                    arguments=[*options.of_structure, *options.passed_on],
                    tool=f"tools/{'frontier' if name == 'frontier' else 'reproduce'}.py"
                    + ("" if name == "frontier" else f" {name}"),
                    command=options.command,
                )


def by_contender(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Size, contender, and its records, one for each seed; in the order of the file. Of runs that another machine
    repeated, to compare others with, the first counts."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for record in records:
        d = record["details"]
        found.setdefault((d["size"], d["contender"]), {}).setdefault(d["seed"], record)
    for size, name in sorted(found, key=lambda pair: pair[0]):
        yield size, name, [*found[size, name].values()]
