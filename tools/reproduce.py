"""The paper's tables, figure and claims, measured here.

    python tools/reproduce.py NAME [--json FILE] [--picture FILE.svg] [--quick] [--key …]

table5: VGG-19 on CIFAR-10 at the sizes of the paper's Table 5: accuracy, minutes of both passes, speed-up.
figure4: E L², V(s) and V_max(s) through the training of ResNet-32 (Figure 4, and the properties it shows).
interval: final quality when the subnetwork is resampled every 1, 10, 50, 200 steps (the claim of Section D).
cost: train cost of dense training, GrowEfficient, the paper's method and this one (Section C.1), counted and timed.
wide: a master 16 times as wide as the subnetwork that fits (channel ratios far below the paper's).
variance: noise of the estimators of the gradient of s, for the same two forward passes.
frontier: loss against device memory and time, beside small dense networks (also: `python tools/frontier.py`).
recipe: what each choice of how s and the weights are trained is worth, one change at a time.

Records and picture go to tools/results/, and those of other sizes and devices stay. Every training run has a folder of
its own in `--out`; one that is complete is not repeated, an interrupted one goes on. `NAME --help` lists the sizes;
keys of a config that follow are passed on to every run, `--structure.…` to the sparse ones. `--quick`: tiny runs that
prove only that it works.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from benchmarks.records import Setting, merge, read_records, table
from reproduction import PARTS
from rich.console import Console

from offload_trainer.errors import UserError

RESULTS = Path(__file__).parent / "results"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    quick = "--quick" in arguments
    for name, part in PARTS.items():
        sub = names.add_parser(
            name,
            description=part.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            help=part.__doc__,
            allow_abbrev=False,
        )
        folder = Path("runs") / (f"{name}-quick" if quick else name)
        sub.add_argument("--out", type=Path, default=folder, help=f"folder of its runs (default: {folder})")
        sub.add_argument("--json", type=Path, metavar="FILE", help=f"default: tools/results/{name}.json")
        sub.add_argument("--picture", type=Path, metavar="FILE", help=f"default: tools/results/{name}.svg")
        sub.add_argument("--quick", action="store_true", help="tiny, and results go into --out unless named")
        part.add_arguments(sub)
        sub.set_defaults(**part.QUICK if quick else {})
    options, options.passed_on = parser.parse_known_args(arguments)
    results = options.out if options.quick else RESULTS
    options.json = options.json or results / f"{options.name}.json"
    options.picture = options.picture or results / f"{options.name}.svg"
    tiny = PARTS[options.name].QUICK_KEYS if quick else []
    if options.passed_on and not options.passed_on[0].startswith("--"):
        parser.error(f"unexpected argument: {options.passed_on[0]}")
    options.of_structure, options.passed_on = _split([*tiny, *options.passed_on])
    options.command = " ".join(["python tools/reproduce.py", *arguments])
    return options


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Keys of the structure with their values, and the others."""
    chosen: tuple[list[str], list[str]] = ([], [])
    for word in words:
        if word.startswith("--"):
            part = chosen[0 if word.startswith("--structure.") else 1]
        part.append(word)  # a value follows its key
    return chosen


def require_the_same(record: dict[str, Any], earlier: list[dict[str, Any]], file: Path) -> None:
    """Raise `UserError` if what a record is compared with, or averaged, was made with other keys of the config."""

    def comparison(one: dict[str, Any]) -> tuple[str, ...]:
        return one["name"], one["device"], one["details"].get("size", one["case"])

    for one in earlier:
        theirs = one["details"].get("arguments", [])
        if comparison(one) == comparison(record) and theirs != record["details"].get("arguments", []):
            raise UserError(
                f"{file} has {comparison(one)[-1]!r} with other keys ({' '.join(theirs) or 'none'}): use another --json"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    part, setting = PARTS[options.name], Setting(Accelerator(), quick=options.quick)
    records = []
    try:
        if options.quick:
            options.out.mkdir(parents=True, exist_ok=True)
        earlier = read_records(options.json)  # a file that cannot be added to is found before hours of measuring
        if not options.picture.parent.is_dir():
            raise UserError(f"--picture {options.picture} cannot be written: its folder must be there")
        for record in part.measure(setting, options):
            records.append(record)
            require_the_same(asdict(record), earlier, options.json)
            merge(options.json, [record])
            print(f"{record.case}: {record.value:.4g} {record.unit}, {record.ratio:.3g} × {record.against}", flush=True)
        part.draw(read_records(options.json), options.picture)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on with what {options.out} holds", file=sys.stderr)
        return 130
    Console().print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
