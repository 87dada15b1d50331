"""Does sampling while training pay, when a pretrained model is shrunk? Contenders at equal training time.

    python tools/shrink.py --minutes 60 --seeds 0 1 [--json FILE] [--picture FILE.svg] [--key value …]

ours: s from importance, exploring until it settles after half of the run. Its kept units change, so they stand in for
    no others.
fixed: the config as it is: the same widths, chosen once by the same importance, then trained as a dense model.
plain: as fixed, but what is kept does not stand in for what is left out: ordinary structured pruning.
random: the same widths, chosen at random, then trained.
scratch: the small dense network of those widths, from random weights: what the device could train without this project.
full: the whole model fine-tuned, as the upper bound.

Each is a run of its own of offload_trainer/run.py, its number of steps such that training takes the given time: what a
step costs is measured first, with pairs of subnets and without. Loading, evaluation, checkpoints, and what comes before
the first step (importance, standing in) are not in that time; the last is recorded. Further arguments are passed on to
every run.
Runs that are complete in `--out` are not repeated, so an interrupted comparison goes on where it was.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from benchmarks.records import Record, Setting, merge, read_records, table
from reproduction.pictures import new_figure, save
from reproduction.runs import finish
from rich.console import Console
from transformers import AutoConfig

from offload_trainer.config import parse
from offload_trainer.errors import UserError

ROOT = Path(__file__).parent.parent
WHOLE = ["--structure.keep", "null", "--structure.groups", '{"*": 1.0}', "--structure.start", "uniform"]
CONTENDERS: dict[str, list[str]] = {
    "ours": ["--structure.settle", "0.5"],
    "fixed": ["--structure.settle", "1"],
    "plain": ["--structure.settle", "1", "--structure.stand_in", "false"],
    "random": ["--structure.settle", "1", "--structure.start", "random"],
    "scratch": ["--structure.settle", "1", "--structure.start", "random"],
    # A rate that suits a model that has to relearn half of itself would spoil one that is whole.
    "full": [*WHOLE, "--structure.multiple_of", "1", "--optimizer.lr", "2e-4"],
}
SAMPLE = 10
"""Steps of the rounds that tell what a step costs."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="shrink.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shrink_smollm2.yaml")
    parser.add_argument("--minutes", type=float, default=60, help="training time of every contender")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is shared")
    parser.add_argument("--points", type=int, default=8, help="evaluations in a run")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/shrink, or runs/shrink-quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the records to this file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw perplexity against time")
    parser.add_argument("--quick", action="store_true", help="a few steps each: proves only that it runs")
    options, options.passed_on = parser.parse_known_args(arguments)
    options.out = options.out or Path("runs") / ("shrink-quick" if options.quick else "shrink")
    options.command = " ".join(["python tools/shrink.py", *(sys.argv[1:] if arguments is None else arguments)])
    setting = Setting(Accelerator(), quick=options.quick)
    try:
        if options.json:
            read_records(options.json)
        if options.picture and not options.picture.parent.is_dir():
            raise UserError(f"--picture {options.picture} cannot be written: its folder must be there")
        results: dict[tuple[str, int], dict[str, Any]] = {}
        for seed in options.seeds:
            for name in options.contenders:
                results[name, seed] = Contender(options, name, seed).result()
                print(f"{name}, seed {seed}: perplexity {results[name, seed]['perplexity']:.2f}", flush=True)
        records = [_record(setting, options, *key, results) for key in results]
        if options.json:
            merge(options.json, records)
        if options.picture:
            draw(read_records(options.json) if options.json else [asdict(one) for one in records], options.picture)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on with what {options.out} holds", file=sys.stderr)
        return 130
    Console().print(table(records))
    return 0


def random_weights(config: Path, passed_on: Sequence[str]) -> list[str]:
    """Keys of the config for the same model and tokenizer, without the weights in its folder."""
    model = parse(["--config", str(config), *passed_on]).task.model
    if not isinstance(model, str):  # a network that is new in any case
        return []
    settings = json.loads((Path(model) / "config.json").read_text())
    # Files carry what no field of theirs is, such as tokens of the tokenizer; a network of one's own may not.
    fields = {
        "model_type",
        "head_dim",
        *(field.name for field in dataclasses.fields(AutoConfig.from_pretrained(model))),
    }
    settings = {name: value for name, value in settings.items() if name in fields}
    return ["--task.model", json.dumps(settings), "--task.tokenizer", model]


class Contender:
    """One contender with one seed."""

    def __init__(self, options: argparse.Namespace, name: str, seed: int):
        self.options, self.name, self.seed = options, name, seed
        untrained = random_weights(options.config, options.passed_on) if name == "scratch" else []
        self.arguments = [*options.passed_on, *CONTENDERS[name], *untrained, "--track.display", "plain"]
        self.clock = {"wall": "train_seconds", "cpu": "train_cpu_seconds"}[options.clock]

    def result(self) -> dict[str, Any]:
        """Train for the given time, unless that is done already; what came of it."""
        options = self.options
        steps = 6 if options.quick else max(1, round(60 * options.minutes / self.seconds_per_step()))
        every = max(1, steps // options.points)
        shown = ["--track.eval_every", every, "--track.log_every", max(1, every // 4)]
        arguments = [*self.arguments, "--steps", steps, "--seed", self.seed, *shown]
        run = finish(options.out / f"{self.name}-{self.seed}", options.config, arguments)
        exported, last = run.summary["exported"], run.metrics[-1]
        points = [(r["step"], r[self.clock], r["val_loss"]) for r in run.metrics if "val_loss" in r]
        return {
            "perplexity": math.exp(exported["loss"]),
            "parameters": exported["parameters"],
            "steps": run.summary["steps"],
            "seconds": last[self.clock],
            "wall_seconds": last["train_seconds"],
            "start_seconds": run.summary["seconds"].get("start", 0.0),
            "points": [*points, (last["step"], last[self.clock], exported["loss"])],
            "device_bytes": run.device_bytes,
            "settings": run.settings,
        }

    def seconds_per_step(self) -> float:
        """Of the whole run: while it explores, rounds have pairs; once it is settled, they have none."""
        config = parse(["--config", str(self.options.config), *self.arguments, "--steps", "1"])
        exploring = 1 - config.structure.settle
        wanted = config.structure.paired_batches * SAMPLE / config.sync_every  # pairs in a round of the sample
        pairs = max(1, round(wanted))
        alone = self._cost(1, pairs)
        paired = self._cost(0, pairs) if exploring else alone
        return alone + exploring * (paired - alone) * wanted / pairs

    def _cost(self, settle: int, pairs: int) -> float:
        """Seconds of a step in the second and third round, transfers included; in the first the plan is known and
        everything is made."""
        arguments = [*self.arguments, "--steps", 3 * SAMPLE, "--sync_every", SAMPLE, "--seed", 0]
        arguments += ["--structure.settle", settle, "--structure.paired_batches", pairs]
        arguments += ["--track.log_every", SAMPLE, "--track.eval_every", 0, "--task.val_batches", 1]
        run = finish(self.options.out / f"{self.name}-cost-{settle}", self.options.config, arguments)
        first, *_, last = (record for record in run.metrics if record["step"])
        return (last[self.clock] - first[self.clock]) / (last["step"] - first["step"])


def _record(
    setting: Setting, options: argparse.Namespace, name: str, seed: int, results: dict[tuple[str, int], Any]
) -> Record:
    result = results[name, seed]
    first = "full" if ("full", seed) in results else next(one for one, of in results if of == seed)
    against = results[first, seed]["perplexity"]
    details = {key: value for key, value in result.items() if key != "perplexity"}
    return setting.record(
        "shrink",
        f"{name}, seed {seed}, {options.minutes:g} min",
        result["perplexity"],
        "perplexity",
        result["perplexity"] / against,
        f"{first}, same seed",
        against_value=against,
        repeats=1,
        clock=options.clock,
        arguments=options.passed_on,
        tool="tools/shrink.py",
        command=options.command,
        **details,
    )


def comparison(record: dict[str, Any]) -> str:
    """The runs that one is compared with: as long as it, on the same held-out text."""
    steps = record["details"]["steps"]
    if "other held-out" in record["case"]:
        return "for as long, other held-out text"
    return "for as long" if steps > 100 else f"{steps} steps"


def contender(record: dict[str, Any]) -> str:
    return record["case"].partition(", seed")[0]


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Perplexity on held-out text against training time: a panel for each comparison, a line for each run."""
    panels = sorted({comparison(record) for record in records})
    names = list(dict.fromkeys(map(contender, records)))
    figure, grid = new_figure(1, len(panels), (5.2 * len(panels), 4.2), squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        for record in (one for one in records if comparison(one) == panel):
            name, details = contender(record), record["details"]
            minutes = [seconds / 60 for _, seconds, _ in details["points"]]
            perplexity = [math.exp(loss) for _, _, loss in details["points"]]
            label = f"{name} ({details['parameters'] / 1e6:.0f} M)"
            axes.plot(minutes, perplexity, color=f"C{names.index(name)}", marker=".", label=label)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), frameon=False)
        clocks = " and ".join(dict.fromkeys(r["details"]["clock"] for r in records if comparison(r) == panel))
        axes.set(xlabel=f"training time, minutes ({clocks})", title=panel, yscale="log")
        axes.grid(alpha=0.3, which="both")
    grid[0][0].set(ylabel="perplexity, held-out text")
    save(figure, file)


if __name__ == "__main__":
    sys.exit(main())
