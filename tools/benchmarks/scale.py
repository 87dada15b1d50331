"""What grows with the full model when the subnet stays as it is: only its place in host memory, if all is well.

Every size lives in a process of its own, and the processes take turns at a round each, so that whatever slows the
machine for a while slows all of them. `python -m benchmarks.scale HEADS SHAPE PRECISION` is such a process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from accelerate import Accelerator

from benchmarks.peers.sizes import fill
from benchmarks.records import Record, Setting
from benchmarks.timing import times_faster
from benchmarks.workloads import llama, on_device
from offload_trainer import Offloader, Structure, memory
from offload_trainer.errors import UserError

TOOLS = Path(__file__).parents[1]
SUBNET = 12
"""Heads of every subnet. A head brings its share of the residual stream and of the MLP with it."""
HEADS = {1: 17, 2: 24, 4: 34, 8: 48, 16: 68}
"""Times the parameters of the smallest full model (to within 1%) → heads: 12 of 17 are about half the parameters."""
QUICK = (1, 4)


@dataclass(frozen=True)
class Shape:
    """What does not grow."""

    head: int
    """Size of a head, and residual features that come with it."""
    mlp: int
    """MLP features that come with a head."""
    layers: int
    batch: int
    sequence: int
    sync_every: int
    repeats: int
    """Timed rounds of each full model."""


SHAPES = {
    "quick": Shape(head=4, mlp=8, layers=1, batch=2, sequence=16, sync_every=8, repeats=2),
    "cpu": Shape(head=32, mlp=96, layers=2, batch=4, sequence=128, sync_every=20, repeats=7),
    "cuda": Shape(head=128, mlp=384, layers=2, batch=8, sequence=1024, sync_every=50, repeats=5),
}
"""Of the full models of all sizes together the masters hold 0.3 million, 0.24 and 3.8 billion parameters."""


def measure(setting: Setting) -> Iterator[Record]:
    shape = SHAPES[setting.size]
    precision = setting.accelerator.mixed_precision
    sizes = QUICK if setting.quick else tuple(HEADS)
    with ExitStack() as stack:
        models = {times: stack.enter_context(FullModel(HEADS[times], shape, precision)) for times in sizes}
        for model in models.values():
            model.round()  # its first; also waits until it is there, so that none starts while another is timed
        rounds: dict[int, list[dict[str, float]]] = {times: [] for times in sizes}
        for _ in range(shape.repeats):
            for times, model in models.items():
                rounds[times].append(model.round())
    for times in sizes:
        yield from records(setting, shape, times, rounds)


def records(setting: Setting, shape: Shape, times: int, rounds: dict[int, list[dict[str, float]]]) -> Iterator[Record]:
    """How each number of a full model compares with the smallest one's."""
    last = rounds[times][-1]
    common = {"times": times, "repeats": shape.repeats, "parameters": last["parameters"]}
    for what, unit, scale, aim in (
        ("step", "ms", 1e3, 0.97),
        ("round", "s", 1, None),
        ("gather", "ms", 1e3, 1.0),
        ("writeback", "ms", 1e3, 1.0),
    ):
        seconds = {str(size): [one[what] for one in own] for size, own in rounds.items()}
        yield setting.record(
            "scale",
            f"llama {times}x {what}",
            scale * median(seconds[str(times)]),
            unit,
            times_faster(seconds, str(times), "1"),
            "the smallest full model",
            aim=aim,
            against_value=scale * median(seconds["1"]),
            moved_bytes=last["moved_bytes"],
            **common,
        )
    for what, baseline, against in (
        ("host", last["master_bytes"], "bytes of the master and its moments"),
        ("device", rounds[1][-1]["device_bytes"], "the smallest full model"),
    ):
        yield setting.record(
            "scale",
            f"llama {times}x {what}",
            last[f"{what}_bytes"] / 2**20,
            "MiB",
            last[f"{what}_bytes"] / baseline,
            against,
            against_value=baseline / 2**20,
            aim=1.0 if what == "device" else None,
            **common,
        )


class FullModel:
    """A process that holds a master and trains a round when told to. A context manager."""

    def __init__(self, heads: int, shape: Shape, precision: str):
        paths = [str(TOOLS), str(TOOLS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scale", str(heads), json.dumps(asdict(shape)), precision],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round(self) -> dict[str, float]:
        """Have it train a round; seconds of its parts, and bytes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it ended; the next line says so
            print(file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(f"bench.py scale: a process ended with exit code {self._process.wait()}, see above")
        return json.loads(answer)

    def __enter__(self) -> "FullModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # nothing of it is kept
        with suppress(BrokenPipeError), self._process:  # closes its pipes
            pass


def in_this_process(heads: int, shape: Shape, precision: str) -> None:
    """Train a round for every line that comes in, and answer with a line of JSON; the first is not one to time."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    accelerator = Accelerator(mixed_precision=precision)
    workload = llama(
        hidden=heads * shape.head,
        intermediate=heads * shape.mlp,
        heads=heads,
        layers=shape.layers,
        batch=shape.batch,
        sequence=shape.sequence,
    )
    model = workload.build_empty()
    groups = workload.groups(model)
    structure = Structure(groups, SUBNET / heads, seed=0)
    with Offloader(
        model,
        groups,
        workload.loss_fn,
        optimizer=workload.optimizer,
        structure=structure,
        sync_every=shape.sync_every,
        accelerator=accelerator,
        materialise=lambda model: fill(model.parameters(), accelerator.device),
    ) as offloader:
        batches = cycle(on_device(workload, 4, accelerator.device))

        def steps(count: int) -> float:
            """Train so many steps; seconds."""
            start = perf_counter()
            for _ in range(count):
                accelerator.backward(offloader.loss(next(batches)))
                offloader.step()
            memory.synchronize(accelerator.device)
            return perf_counter() - start

        for _ in range(3):  # the third round is the first to find everything already made
            steps(structure.paired_batches + 1)
            offloader.finish_round()
        for _ in sys.stdin:
            paired = steps(structure.paired_batches)  # after the gather, and with the reference's forwards
            within = steps(shape.sync_every - structure.paired_batches - 1)
            last = steps(1)  # before the write-back
            measured = offloader.measured()
            answer = {
                "step": within / (shape.sync_every - structure.paired_batches - 1),
                "round": paired + within + last,
                "gather": measured["gather_ms"] / 1e3,
                "writeback": measured["writeback_ms"] / 1e3,
                "moved_bytes": measured["bytes_moved"],
                "host_bytes": memory.host_peak(),
                "device_bytes": memory.device_peak(accelerator.device) or measured["device_bytes"],
                **held(offloader),
            }
            print(json.dumps(answer), file=answers, flush=True)


def held(offloader: Offloader) -> dict[str, Any]:
    """What the host keeps of the full model."""
    moments = [tensor for moment in offloader.moments.values() for tensor in moment.values()]
    return {
        "parameters": sum(p.numel() for p in offloader.model.parameters()),
        "master_bytes": sum(tensor.nbytes for tensor in [*offloader.master.values(), *moments]),
    }


if __name__ == "__main__":
    in_this_process(int(sys.argv[1]), Shape(**json.loads(sys.argv[2])), sys.argv[3])
