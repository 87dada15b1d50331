"""Does sampling while training pay, when a pretrained model is shrunk? Contenders at equal training time.

    python tools/shrink.py --minutes 60 --seeds 0 1 [--json FILE] [--picture FILE.svg] [--key value …]

ours: s from importance, exploring until it settles after half of the run.
fixed: the config as it is: the same widths, chosen once by the same importance, then trained as a dense model.
plain: as fixed, but what is kept does not stand in for what is left out: ordinary structured pruning.
random: the same widths, chosen at random, then trained.
scratch: the small dense network of those widths, from random weights: what the device could train without this project.
full: the whole model fine-tuned, as the upper bound.

Each is a run of its own of offload_trainer/run.py, its number of steps such that training (without loading,
evaluation and checkpoints) takes the given time: what a step costs is measured first. Further arguments are passed on
to every run.
Runs that are complete in `--out` are not repeated, so an interrupted comparison goes on where it was.
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from benchmarks.launching import launch
from benchmarks.records import Record, Setting, merge, read_records, table
from reproduction.pictures import new_figure, save
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
SUMMARY, METRICS, COST = "summary.json", "metrics.jsonl", "seconds_per_step.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="shrink.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shrink_smollm2.yaml")
    parser.add_argument("--minutes", type=float, default=60, help="training time of every contender")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is shared")
    parser.add_argument("--points", type=int, default=8, help="evaluations in a run")
    parser.add_argument("--out", type=Path, default=Path("runs/shrink"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the records to this file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw perplexity against time")
    parser.add_argument("--quick", action="store_true", help="a few steps each: proves only that it runs")
    options, passed_on = parser.parse_known_args(arguments)
    setting = Setting(Accelerator(), quick=options.quick)
    try:
        if options.json:
            read_records(options.json)
        results: dict[tuple[str, int], dict[str, Any]] = {}
        for seed in options.seeds:
            for name in options.contenders:
                untrained = random_weights(options.config, passed_on) if name == "scratch" else []
                run = Run(options, name, seed, [*passed_on, *CONTENDERS[name], *untrained])
                results[name, seed] = run.result()
                print(f"{name}, seed {seed}: perplexity {results[name, seed]['perplexity']:.2f}", flush=True)
        records = [_record(setting, *key, result, results, options.clock) for key, result in results.items()]
        if options.json:
            merge(options.json, records)
        if options.picture:
            draw(results, options.picture, options.clock)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
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


class Run:
    """One contender with one seed, in a folder of its own."""

    def __init__(self, options: argparse.Namespace, name: str, seed: int, arguments: list[str]):
        self.options, self.name, self.seed, self.arguments = options, name, seed, arguments
        self.out: Path = options.out / f"{name}-{seed}"
        self.clock = {"wall": "train_seconds", "cpu": "train_cpu_seconds"}[options.clock]

    def result(self) -> dict[str, Any]:
        """Train for the given time, unless that is done already; what came of it."""
        if not (self.out / SUMMARY).is_file():
            quick = self.options.quick
            steps = 6 if quick else max(1, round(60 * self.options.minutes / self._seconds_per_step()))
            every = max(1, steps // self.options.points)
            self._launch(self.out, steps, "--track.eval_every", every, "--track.log_every", max(1, every // 4))
            shutil.rmtree(self.out / "checkpoints")
        summary = json.loads((self.out / SUMMARY).read_text())
        records = [json.loads(line) for line in (self.out / METRICS).read_text().splitlines()]
        points = [(r["step"], r[self.clock], r["val_loss"]) for r in records if "val_loss" in r]
        last = records[-1]
        points.append((last["step"], last[self.clock], summary["exported"]["loss"]))
        return {
            "perplexity": math.exp(summary["exported"]["loss"]),
            "parameters": summary["exported"]["parameters"],
            "steps": summary["steps"],
            "seconds": last[self.clock],
            "wall_seconds": last["train_seconds"],
            "points": points,
        }

    def _seconds_per_step(self) -> float:
        """Of two whole rounds, pairs and transfers included; the first step, which allocates, counts too."""
        folder: Path = self.options.out / f"{self.name}-cost"
        if not (folder / COST).is_file():
            steps = 20
            self._launch(folder, steps, "--track.log_every", steps, "--sync_every", steps // 2, "--task.val_batches", 1)
            last = json.loads((folder / METRICS).read_text().splitlines()[-1])
            shutil.rmtree(folder / "checkpoints")
            (folder / COST).write_text(json.dumps(last[self.clock] / steps))
        return json.loads((folder / COST).read_text())

    def _launch(self, out: Path, steps: int, *arguments: object) -> None:
        words = ["--config", self.options.config, "--out", out, "--steps", steps, "--seed", self.seed]
        launch(f"{self.name}, seed {self.seed}", [*words, "--resume", "auto", *self.arguments, *arguments])


def _record(
    setting: Setting, name: str, seed: int, result: dict[str, Any], results: dict[tuple[str, int], Any], clock: str
) -> Record:
    first = "full" if ("full", seed) in results else next(one for one, of in results if of == seed)
    ratio = result["perplexity"] / results[first, seed]["perplexity"]
    case = f"{name}, seed {seed}, {result['seconds'] / 60:.0f} min"
    details = {key: result[key] for key in ("parameters", "steps", "seconds", "wall_seconds", "points")}
    details |= {"clock": clock, "tool": "tools/shrink.py", "repeats": 1}
    return setting.record("shrink", case, result["perplexity"], "perplexity", ratio, f"{first}, same seed", **details)


def draw(results: dict[tuple[str, int], dict[str, Any]], file: Path, clock: str) -> None:
    """Perplexity on held-out text against training time, a line for each run, a colour for each contender."""
    figure, axes = new_figure()
    names = list(dict.fromkeys(name for name, _ in results))
    for (name, _), result in results.items():
        minutes = [seconds / 60 for _, seconds, _ in result["points"]]
        perplexity = [math.exp(loss) for _, _, loss in result["points"]]
        label = f"{name} ({result['parameters'] / 1e6:.0f} M)"
        axes.plot(minutes, perplexity, color=f"C{names.index(name)}", marker=".", label=label)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)
    axes.set(xlabel=f"training time, minutes ({clock})", ylabel="perplexity, held-out text", yscale="log")
    axes.grid(alpha=0.3, which="both")
    save(figure, file)


if __name__ == "__main__":
    sys.exit(main())
