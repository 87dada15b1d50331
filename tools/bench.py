"""Measure, always as a ratio to a baseline that takes turns with it in the same process.

    python tools/bench.py slicing overhead transfer load ledger [--json FILE] [--quick]

slicing: a training step of the sliced subnet, against the full dense network and against masks.
overhead: steps per second of an offloaded run, against the same small network trained alone.
transfer: GB/s of gather and write-back, against a plain copy of the same bytes.
load: GB/s of a checkpoint's way from its files into the master, against reading the same files.
ledger: peaks of memory in real runs, host and device, against what was predicted.

Records go into FILE as they are measured; those of other cases and devices in it stay. `--quick` runs tiny sizes in
seconds and proves only that everything runs: its cases bear their own names, so they never replace a measurement.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from accelerate import Accelerator
from benchmarks import ledger, loading, overhead, slicing, transfer
from benchmarks.records import Record, Setting, merge, read_records, table
from rich.console import Console

from offload_trainer.errors import UserError

BENCHMARKS: dict[str, Callable[[Setting], Iterator[Record]]] = {
    "slicing": slicing.measure,
    "overhead": overhead.measure,
    "transfer": transfer.measure,
    "load": loading.measure,
    "ledger": ledger.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the records to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds each")
    options = parser.parse_args(arguments)
    try:
        if options.json:
            read_records(options.json)  # a file that cannot be added to is found before minutes of measuring
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            raise UserError(f"bench.py measures one process; {accelerator.num_processes} were started")
        run(options.names, Setting(accelerator, quick=options.quick), options.json)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(names: Sequence[str], setting: Setting, file: Path | None) -> list[Record]:
    """Run benchmarks by name, print a table, and merge the records into `file`."""
    records: list[Record] = []
    console = Console()
    with console.status("") as status:
        for name in dict.fromkeys(names):
            status.update(name)
            for record in BENCHMARKS[name](setting):
                records.append(record)
                status.update(f"{name}: {record.case} done")
                if file:
                    merge(file, [record])
    console.print(table(records))
    return records


if __name__ == "__main__":
    sys.exit(main())
