"""Measure, always as a ratio to a baseline that takes turns with it, in the same process where it can.

    python tools/bench.py slicing overhead transfer load ledger storage peers scale start larger [--json FILE] [--quick]

slicing: a training step of the sliced subnet, against the full dense network and against masks.
overhead: steps per second of an offloaded run, against the same small network trained alone.
transfer: GB/s of gather and write-back, against a plain copy of the same bytes.
load: GB/s of a checkpoint's way from its files into the master, against reading the same files.
ledger: peaks of memory in real runs, host and device, against what was predicted.
storage: validation loss with fewer host bytes per parameter, against a master that is all fp32.
peers: tokens per second, memory and link of what else trains a model larger than the device, against plain training
    without a cap. Wants a GPU (on a CPU it only shows that it runs) and `pip install --no-deps torchao`, which the
    project itself does not depend on; what is not installed is recorded as such.
scale: step, round, transfers and memory as the full model grows at a fixed subnet, against the smallest.
start: seconds from launch to the first step, and where they go, against building the model with transformers alone.
larger: masters many times the device memory (under `--cap`: 3 billion parameters, and 40 billion at 2 bytes each, on a
    GPU): seconds to build, gather, write back and step, and the loss.

Records go into FILE as they are measured; those of other cases and devices in it stay. `--quick` runs tiny sizes in
seconds and proves only that everything runs: its cases bear their own names, so they never replace a measurement.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from accelerate import Accelerator
from benchmarks import larger, ledger, loading, overhead, peers, scale, slicing, start, storage, transfer
from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.sizes import SIZES
from benchmarks.records import Record, Setting, merge, read_records, table
from rich.console import Console

from offload_trainer.errors import UserError

BENCHMARKS: dict[str, Callable[[Setting, argparse.Namespace], Iterator[Record]]] = {
    "slicing": lambda setting, _: slicing.measure(setting),
    "overhead": lambda setting, options: overhead.measure(setting, options.intervals),
    "transfer": lambda setting, _: transfer.measure(setting),
    "load": lambda setting, _: loading.measure(setting),
    "ledger": lambda setting, _: ledger.measure(setting),
    "storage": lambda setting, _: storage.measure(setting),
    "peers": lambda setting, options: peers.measure(setting, peers_options(options)),
    "scale": lambda setting, _: scale.measure(setting),
    "start": lambda setting, options: start.measure(setting, options.size),
    "larger": lambda setting, options: larger.measure(setting, int(options.cap * 2**30)),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the records to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds each")
    parser.add_argument("--size", choices=SIZES, help="of the model of peers and start")
    parser.add_argument("--intervals", type=int, nargs="+", metavar="K", help="of overhead (default: 50 10 200)")
    group = parser.add_argument_group("peers")
    group.add_argument(
        "--cap",
        type=float,
        default=8,
        metavar="GIB",
        help="device memory of each, CUDA only, also of larger (default: 8)",
    )
    group.add_argument("--minutes", type=float, default=0.5, help="to time each contender for (default: 0.5)")
    group.add_argument("--batch", type=int, help="sequences in a step")
    group.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    options = parser.parse_args(arguments)
    options.command = " ".join(["python tools/bench.py", *(sys.argv[1:] if arguments is None else arguments)])
    return options


def peers_options(options: argparse.Namespace) -> peers.Options:
    contenders = tuple(options.contenders or ())
    return peers.Options(options.size, options.batch, int(options.cap * 2**30), options.minutes, contenders)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.json:
            read_records(options.json)  # a file that cannot be added to is found before minutes of measuring
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            raise UserError(f"bench.py measures one process; {accelerator.num_processes} were started")
        run(options, Setting(accelerator, quick=options.quick))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the records until here are kept", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace, setting: Setting) -> list[Record]:
    """Run benchmarks by name, print a table, and merge the records into a file, each as it comes."""
    records: list[Record] = []
    console = Console()
    with console.status("") as status:
        for name in dict.fromkeys(options.names):
            status.update(name)
            for record in BENCHMARKS[name](setting, options):
                record.details["command"] = options.command
                records.append(record)
                status.update(f"{name}: {record.case} done")
                if options.json:
                    merge(options.json, [record])
    console.print(table(records))
    return records


if __name__ == "__main__":
    sys.exit(main())
